// The CPU kernels against the formula in double precision, over many shapes: edges first, then drawn at random; every
// instruction set that this processor has, alone, in tasks that run at once, and several calls at once.
//
//     cpu_sweep [--cases N] [--seed S]
//
// The formula rounds where the op's definition does, and bounds what float32 sums in any order may give; y must lie
// within. Outputs start as NaN and lie between guard bytes; weights are gone after packing. Prints the first failures
// and exits with 1 where there are any.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "code.h"
#include "slots.h"

namespace teamlora::cpu {
namespace {

constexpr double kEps = 1.0 / (1 << 24);

// `value` to the nearest number of T, ties to even; T by its digits and least exponent.
double to_type(DataType type, double value) {
    if (type == DataType::kFloat32) return static_cast<float>(value);
    if (!std::isfinite(value) || value == 0) return value;
    const bool half = type == DataType::kFloat16;
    const int exponent = std::max(std::ilogb(value), half ? -14 : -126);
    const double unit = std::ldexp(1.0, exponent - (half ? 10 : 7));
    const double rounded = std::nearbyint(value / unit) * unit;
    return std::fabs(rounded) > (half ? 65504.0 : 3.3895313892515355e38) ? std::copysign(INFINITY, value) : rounded;
}

// Written with nothing of the kernels: a number of T in memory, from and to double.
double get(DataType type, const unsigned char* at) {
    if (type == DataType::kFloat32) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    const double sign = bits >> 15 ? -1 : 1;
    const int digits = type == DataType::kFloat16 ? 10 : 7, bias = type == DataType::kFloat16 ? 15 : 127;
    const int exponent = (bits & 0x7FFF) >> digits, fraction = bits & ((1 << digits) - 1);
    if (exponent == 2 * bias + 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - digits);
    return sign * std::ldexp(fraction + (1 << digits), exponent - bias - digits);
}

void set(DataType type, unsigned char* at, double value) {
    if (type == DataType::kFloat32) {
        const auto narrow = static_cast<float>(value);
        std::memcpy(at, &narrow, 4);
        return;
    }
    const int digits = type == DataType::kFloat16 ? 10 : 7, bias = type == DataType::kFloat16 ? 15 : 127;
    uint16_t bits = std::signbit(value) ? 0x8000 : 0;
    const double rounded = std::fabs(to_type(type, value));
    if (std::isnan(value)) {
        bits |= 0x7FFF;
    } else if (std::isinf(rounded)) {
        bits |= static_cast<uint16_t>((2 * bias + 1) << digits);
    } else if (rounded != 0) {
        const int exponent = std::max(std::ilogb(rounded), 1 - bias);
        const auto mantissa = static_cast<int>(std::ldexp(rounded, digits - exponent));
        // The hidden bit of a normal number adds one to the exponent.
        bits |= static_cast<uint16_t>(((exponent + bias - 1) << digits) + mantissa);
    }
    std::memcpy(at, &bits, 2);
}

// Numbers of T in memory of their own, `misalignment` bytes off, with guards before and behind.
class Array {
public:
    Array(DataType type, int64_t count, size_t misalignment)
        : type_(type), begin_(kGuard + misalignment), bytes_(count * element_size(type)) {
        memory_.assign(begin_ + bytes_ + kGuard, 0xFF);
    }
    unsigned char* data() { return memory_.data() + begin_; }
    double operator[](int64_t i) const { return get(type_, memory_.data() + begin_ + i * element_size(type_)); }
    // All of them: the formula needs each many times.
    std::vector<double> numbers() const {
        std::vector<double> all(bytes_ / element_size(type_));
        for (size_t i = 0; i < all.size(); ++i) all[i] = (*this)[static_cast<int64_t>(i)];
        return all;
    }
    void set(int64_t i, double value) { cpu::set(type_, data() + i * element_size(type_), value); }
    bool guards_intact() const {
        const auto intact = [](unsigned char byte) { return byte == 0xFF; };
        return std::all_of(memory_.begin(), memory_.begin() + begin_, intact) &&
               std::all_of(memory_.begin() + begin_ + bytes_, memory_.end(), intact);
    }

private:
    static constexpr size_t kGuard = 128;
    DataType type_;
    size_t begin_, bytes_;
    std::vector<unsigned char> memory_;
};

struct Case {
    Shape shape;
    int64_t tokens = 1;
    int64_t threads = 1;
    bool in_place = false;
    size_t misalignment = 0;
    // Added to one element of x.
    double poison = 0;
};

std::string describe(const Case& c) {
    std::string text = "dtype " + std::to_string(static_cast<int>(c.shape.dtype)) + ", weights " +
                       std::to_string(static_cast<int>(c.shape.weights)) + ", tokens " + std::to_string(c.tokens) +
                       ", in " + std::to_string(c.shape.in) + ", k " + std::to_string(c.shape.num_experts) + ", c " +
                       std::to_string(c.shape.expert_rank) + (c.shape.shared_down ? ", shared" : "") + ", threads " +
                       std::to_string(c.threads) + (c.in_place ? ", in place" : "") + ", off by " +
                       std::to_string(c.misalignment) + ", poison " + std::to_string(c.poison) + ", out";
    for (const int64_t width : c.shape.out_splits) text += " " + std::to_string(width);
    return text;
}

// A value and how far another may be from it.
struct Bounded {
    double value, error;
};

Bounded rounded(DataType type, Bounded x) {
    const double nearest = to_type(type, x.value);
    if (type == DataType::kFloat32) return {nearest, x.error + kEps * std::fabs(nearest)};
    return {nearest, std::max(to_type(type, x.value + x.error) - nearest, nearest - to_type(type, x.value - x.error))};
}

// w of one token and sibling.
std::vector<Bounded> route(const std::vector<Bounded>& logits, const float* mix) {
    const size_t k = logits.size();
    double most = -INFINITY, most_error = 0;
    bool finite = true;
    for (const Bounded& l : logits) {
        most = std::max(most, l.value), most_error = std::max(most_error, l.error);
        finite = finite && std::isfinite(l.value);
    }
    if (!finite) return std::vector<Bounded>(k, {NAN, 0});
    std::vector<Bounded> w(k, {0, 0});
    for (size_t i = 0; i < k; ++i) {
        const double distance = logits[i].value - most, p = std::exp(distance);
        const double relative = logits[i].error + most_error + (2.0 * k + 16 + std::fabs(distance)) * kEps;
        for (size_t j = 0; j < k; ++j) {
            w[j].value += p * mix[i * k + j];
            w[j].error += (p * std::expm1(relative) + 1.5e-38) * std::fabs(mix[i * k + j]);
        }
    }
    Bounded sum{0, 0};
    for (const Bounded& one : w) sum.value += one.value, sum.error += one.error + k * kEps * std::fabs(one.value);
    const double least = std::max(std::fabs(sum.value) - sum.error, 1e-300);
    for (Bounded& one : w) {
        one.value /= sum.value;
        one.error = (one.error + std::fabs(one.value) * sum.error) / least + 4 * kEps * std::fabs(one.value);
    }
    return w;
}

void on_threads(void*, void (*task)(void*, size_t), size_t count, void* data) {
    std::vector<std::thread> threads;
    for (size_t i = count; i-- > 1;) threads.emplace_back(task, data, i);
    task(data, 0);
    for (std::thread& thread : threads) thread.join();
}

// The numbers of a call, of all slots' weights.
struct Inputs {
    std::vector<double> x, base, down, up;
    const float* mix;
};

// What a number of y may be: one from `low` to `high`, or none.
struct Range {
    double low = 0, high = 0;
    bool is_finite = true;

    bool holds(double found) const { return is_finite ? found >= low && found <= high : std::isnan(found); }
};

// What y of token `t` may be with the adapter in `slot`, for each column.
void expect(const Shape& s, int64_t t, int64_t slot, const Inputs& in, Range* y) {
    const DataType type = s.dtype;
    const int64_t k = s.num_experts, rows = s.sibling_rows(), rank = s.up_rank(), out = s.out();
    const double* x = &in.x[t * s.in];
    const double *down = &in.down[slot * s.rows() * s.in], *up = &in.up[slot * rank * out];
    int64_t first = 0;
    for (int64_t g = 0; g < s.siblings(); first += s.out_splits[g++]) {
        std::vector<Bounded> z(rows), v(rank);
        for (int64_t row = 0; row < rows; ++row) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < s.in; ++i) {
                const double term = x[i] * down[(g * rows + row) * s.in + i];
                sum += term, size += std::fabs(term);
            }
            z[row] = rounded(type, {sum, (s.in + 8) * kEps * size});
        }
        const float* mix = in.mix + (slot * s.siblings() + g) * k * k;
        const bool has_experts = std::any_of(mix, mix + k * k, [](float m) { return m != 0; });
        const auto w = has_experts ? route({z.begin() + s.down_rank(), z.end()}, mix) : std::vector<Bounded>(k, {0, 0});
        for (int64_t i = 0; i < rank; ++i) {
            const Bounded u = z[s.shared_down ? i % s.expert_rank : i], m = w[i / s.expert_rank];
            const double error = std::fabs(u.value) * m.error + std::fabs(m.value) * u.error + u.error * m.error +
                                 kEps * std::fabs(u.value * m.value);
            v[i] = rounded(type, {has_experts ? u.value * m.value : 0, error});
        }
        for (int64_t o = first; o < first + s.out_splits[g]; ++o) {
            double delta = 0, error = 0;
            for (int64_t i = 0; i < rank; ++i) {
                const double weight = up[i * out + o];
                delta += v[i].value * weight;
                error += std::fabs(weight) * (v[i].error + (rank + 8) * kEps * (std::fabs(v[i].value) + v[i].error));
            }
            const double added = in.base[t * out + o], exact = added + delta;
            error += kEps * (std::fabs(added) + std::fabs(delta));
            y[o] = {to_type(type, exact - error), to_type(type, exact + error), std::isfinite(exact)};
        }
    }
}

// What is wrong with y of the tokens from `first` to `end`, or an empty text.
std::string compare(const std::vector<Range>& expected, int64_t out, int64_t first, int64_t end, const Array& y) {
    for (int64_t i = first * out; i < end * out; ++i) {
        const double found = y[i];
        if (expected[i].holds(found)) continue;
        return "token " + std::to_string(i / out) + ", column " + std::to_string(i % out) + ": " +
               std::to_string(found) + ", expected " + std::to_string(expected[i].low) + " to " +
               std::to_string(expected[i].high);
    }
    return {};
}

// The first thing that is wrong, or an empty text.
std::string check(const Case& c, uint64_t seed) {
    const Shape& s = c.shape;
    const DataType type = s.dtype;
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const auto filled = [&](DataType kind, int64_t count, double scale) {
        Array array(kind, count, kind == DataType::kFloat32 && type != kind ? 0 : c.misalignment);
        for (int64_t i = 0; i < count; ++i) array.set(i, normal(random) * scale);
        return array;
    };
    const int64_t k = s.num_experts, rank = s.up_rank(), out = s.out();
    Array x = filled(type, c.tokens * s.in, 1), base = filled(type, c.tokens * out, 1);
    Array down = filled(s.weights, s.rows() * s.in, 1 / std::sqrt(static_cast<double>(s.in)));
    Array up = filled(s.weights, rank * out, 0.5);
    std::vector<float> mix(s.siblings() * k * k);
    for (int64_t i = 0; i < static_cast<int64_t>(mix.size()); ++i) {
        mix[i] = static_cast<float>((i % (k * k) % (k + 1) == 0) + 0.1 * normal(random));
    }
    if (c.tokens > 0) x.set((c.tokens / 2) * s.in + s.in / 2, c.poison + 1);
    const Inputs inputs{x.numbers(), base.numbers(), down.numbers(), up.numbers(), mix.data()};
    std::vector<Range> expected(c.tokens * out);
    for (int64_t t = 0; t < c.tokens; ++t) expect(s, t, 0, inputs, &expected[t * out]);

    for (const Code* code : available_codes()) {
        const std::string where = std::string(code->name) + ": ";
        Array given_down = down, given_up = up, given_base = base, y(type, c.tokens * out, c.misalignment);
        std::vector<float> given_mix = mix;
        const Projection projection(s, *code, given_down.data(), given_mix.data(), given_up.data());
        for (Array* gone : {&given_down, &given_up}) *gone = Array(type, 0, 0);
        given_mix.clear();
        Array& result = c.in_place ? given_base : y;
        Workspace workspace;
        std::fill_n(workspace.floats(1 << 16), 1 << 16, NAN);
        projection.run({x.data(), given_base.data(), result.data()}, c.tokens, workspace, {on_threads, nullptr},
                       c.threads);
        if (!given_base.guards_intact() || !y.guards_intact()) return where + "wrote beyond its output";
        const std::string wrong = compare(expected, out, 0, c.tokens, result);
        if (!wrong.empty()) return where + wrong;
    }
    return {};
}

// The same with an adapter for each of `rows` rows of `c.tokens` tokens: some without one, some of fewer experts than
// their slot. Each row must be what it is alone, bit for bit.
std::string check_slots(const Case& c, int64_t rows, uint64_t seed) {
    const Shape& s = c.shape;
    const DataType type = s.dtype;
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const int64_t slots = 1 + static_cast<int64_t>(random() % 4), k = s.num_experts, rank = s.up_rank(), out = s.out();
    const auto filled = [&](DataType kind, int64_t count, double scale) {
        Array array(kind, count, kind == DataType::kFloat32 && type != kind ? 0 : c.misalignment);
        for (int64_t i = 0; i < count; ++i) array.set(i, normal(random) * scale);
        return array;
    };
    const int64_t tokens = rows * c.tokens;
    Array x = filled(type, tokens * s.in, 1), base = filled(type, tokens * out, 1);
    Array down = filled(s.weights, slots * s.rows() * s.in, 1 / std::sqrt(static_cast<double>(s.in)));
    Array up = filled(s.weights, slots * rank * out, 0.5);
    std::vector<float> mix(slots * s.siblings() * k * k);
    for (int64_t i = 0; i < static_cast<int64_t>(mix.size()); ++i) {
        const int64_t from = i / k % k, to = i % k, own = i / (k * k) % (k + 1);
        // So many experts of the slot are none: of some siblings all.
        const bool present = from >= own && to >= own;
        mix[i] = present ? static_cast<float>((from == to) + 0.1 * normal(random) / static_cast<double>(k)) : 0.0F;
    }
    if (tokens > 0) x.set(tokens / 2 * s.in + s.in / 2, c.poison + 1);
    std::vector<int32_t> adapter(random() % 3 ? rows : 1);
    for (int32_t& index : adapter) index = static_cast<int32_t>(random() % (slots + 1)) - 1;
    const auto index_of = [&](int64_t row) { return adapter[adapter.size() == 1 ? 0 : row]; };
    const Inputs inputs{x.numbers(), base.numbers(), down.numbers(), up.numbers(), mix.data()};
    std::vector<Range> expected(tokens * out);
    for (int64_t t = 0; t < tokens; ++t) {
        const int32_t index = index_of(t / c.tokens);
        if (index >= 0) expect(s, t, index, inputs, &expected[t * out]);
    }

    for (const Code* code : available_codes()) {
        const std::string where = std::string(code->name) + ", slots: ";
        Array given_base = base, y(type, tokens * out, c.misalignment);
        Array& result = c.in_place ? given_base : y;
        Workspace workspace;
        std::fill_n(workspace.floats(1 << 16), 1 << 16, NAN);
        const auto run = [&](int64_t first, int64_t count, const int32_t* index, bool one, unsigned char* from,
                             unsigned char* to) {
            const size_t element = element_size(type);
            run_slots(s, *code,
                      {x.data() + first * c.tokens * s.in * element, from, to, down.data(), mix.data(), up.data(),
                       index, one},
                      count, c.tokens, workspace, {on_threads, nullptr}, c.threads);
        };
        run(0, rows, adapter.data(), adapter.size() == 1, given_base.data(), result.data());
        if (!given_base.guards_intact() || !y.guards_intact()) return where + "wrote beyond its output";
        for (int64_t row = 0; row < rows; ++row) {
            const int32_t index = index_of(row);
            Array alone = base;
            const size_t at = row * c.tokens * out * element_size(type), bytes = c.tokens * out * element_size(type);
            run(row, 1, &index, false, alone.data() + at, alone.data() + at);
            if (std::memcmp(alone.data() + at, result.data() + at, bytes) != 0) {
                return where + "row " + std::to_string(row) + " is another alone";
            }
            if (index < 0) {
                if (std::memcmp(base.data() + at, result.data() + at, bytes) != 0) return where + "the base is changed";
                continue;
            }
            const std::string wrong = compare(expected, out, row * c.tokens, (row + 1) * c.tokens, result);
            if (!wrong.empty()) return where + "row " + std::to_string(row) + ", " + wrong;
        }
    }
    return {};
}

std::vector<Case> edges() {
    std::vector<Case> cases;
    for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        const auto add = [&](Shape shape, int64_t tokens, int64_t threads) -> Case& {
            shape.dtype = shape.weights = type;
            cases.push_back({std::move(shape), tokens, threads});
            return cases.back();
        };
        add({type, 1, 1, 1, false, {1}}, 1, 1);
        add({type, 7, 4, 2, false, {6}}, 0, 2);
        add({type, 7, 3, 5, true, {0, 6}}, 3, 2);
        add({type, 64, 4, 2, false, {192, 64, 64}}, 1, 4);
        add({type, 64, 4, 8, false, {100, 3}}, 100, 2);
        add({type, 300, 2, 3, true, {33, 5, 7}}, 23, 3);
        add({type, 576, 4, 8, false, {192, 64}}, 30, 8);
        // Enough weights for several tasks of few tokens.
        add({type, 2048, 4, 8, false, {1400, 1401}}, 16, 5);
        add({type, 31, 40, 1, false, {17}}, 9, 2);
        for (const double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
            for (const int64_t tokens : {1, 50}) add({type, 40, 4, 2, false, {37}}, tokens, 2).poison = poison;
        }
        // Weights of this type beside float32.
        for (const int64_t tokens : {1, 2, 9, 70}) {
            for (Shape shape :
                 {Shape{type, 64, 4, 2, false, {192, 64, 5}}, Shape{type, 2048, 4, 8, true, {1400, 1401}}}) {
                add(shape, tokens, 5).shape.dtype = DataType::kFloat32;
            }
        }
    }
    return cases;
}

Case draw(std::mt19937_64& random) {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    Case c;
    c.shape.dtype = c.shape.weights = static_cast<DataType>(below(3));
    if (below(3) == 0) c.shape.dtype = DataType::kFloat32;
    c.shape.in = 1 + below(below(4) ? 80 : 700);
    c.shape.num_experts = 1 + below(6);
    c.shape.expert_rank = 1 + below(9);
    c.shape.shared_down = below(2) != 0;
    for (int64_t g = 1 + below(3); g > 0; --g) c.shape.out_splits.push_back(1 + below(90));
    c.tokens = below(below(3) ? 8 : 120);
    c.threads = 1 + below(9);
    c.in_place = below(2) != 0;
    c.misalignment = below(2) ? 0 : element_size(c.shape.dtype) * below(16);
    return c;
}

// Every number of 16 bits, plus half a unit of its last place: with one expert that passes its input on, y is that sum
// rounded, and the sum lies in the middle of two numbers.
std::string check_ties(DataType type) {
    const Shape shape{type, 2, 1, 1, false, {1}};
    const int64_t tokens = 1 << 16;
    const int digits = type == DataType::kFloat16 ? 10 : 7, least = type == DataType::kFloat16 ? -24 : -126;
    Array x(type, 2 * tokens, 0), y(type, tokens, 0), down(type, 4, 0), up(type, 1, 0);
    for (int64_t i = 0; i < 4; ++i) down.set(i, i < 2);
    up.set(0, 1);
    const float mix = 1;
    for (int64_t t = 0; t < tokens; ++t) {
        const auto bits = static_cast<uint16_t>(t);
        std::memcpy(x.data() + 4 * t, &bits, 2);
        const double number = x[2 * t];
        const bool normal = std::isfinite(number) && number != 0;
        x.set(2 * t + 1, normal ? std::ldexp(1.0, std::max(std::ilogb(number) - digits - 1, least)) : 0);
        y.set(t, 0);
    }
    const auto inline_tasks = [](void*, void (*task)(void*, size_t), size_t count, void* data) {
        for (size_t i = 0; i < count; ++i) task(data, i);
    };
    for (const Code* code : available_codes()) {
        const Projection projection(shape, *code, down.data(), &mix, up.data());
        Array result = y;
        Workspace workspace;
        projection.run({x.data(), y.data(), result.data()}, tokens, workspace, {inline_tasks, nullptr}, 2);
        for (int64_t t = 0; t < tokens; ++t) {
            const double expected = to_type(type, x[2 * t] + x[2 * t + 1]);
            // The router's product with what is not finite is not a number, and so is y.
            if (std::isfinite(x[2 * t]) ? result[t] != expected : !std::isnan(result[t])) {
                return std::string(code->name) + ": " + std::to_string(x[2 * t]) + " gives " +
                       std::to_string(result[t]) + ", expected " + std::to_string(expected);
            }
        }
    }
    return {};
}

// One projection, called by eight threads at once, gives what it gives alone, bit for bit.
std::string check_threads() {
    const Shape shape{DataType::kFloat32, 96, 4, 2, false, {64, 30}};
    std::vector<float> down(shape.rows() * shape.in, 0.01F), up(shape.up_rank() * shape.out(), 0.02F), mix(32, 0.25F);
    for (size_t i = 0; i < down.size(); ++i) down[i] *= static_cast<float>(i % 13);
    const Projection projection(shape, *available_codes().front(), down.data(), mix.data(), up.data());
    const auto run = [&](int64_t tokens, Workspace& workspace) {
        std::vector<float> x(tokens * shape.in), y(tokens * shape.out(), 1.0F);
        std::iota(x.begin(), x.end(), 0.5F);
        const auto inline_tasks = [](void*, void (*task)(void*, size_t), size_t count, void* data) {
            for (size_t i = 0; i < count; ++i) task(data, i);
        };
        projection.run({x.data(), y.data(), y.data()}, tokens, workspace, {inline_tasks, nullptr}, 3);
        return y;
    };
    std::vector<std::vector<float>> alone;
    Workspace shared;
    for (int64_t tokens = 0; tokens < 60; ++tokens) alone.push_back(run(tokens, shared));
    std::vector<int> wrong(8);
    std::vector<std::thread> threads;
    for (int& count : wrong) {
        threads.emplace_back([&] {
            Workspace workspace;
            for (int64_t tokens = 0; tokens < 60; ++tokens) count += run(tokens, workspace) != alone[tokens];
        });
    }
    for (std::thread& thread : threads) thread.join();
    return std::accumulate(wrong.begin(), wrong.end(), 0) ? "threads at once disturb each other" : "";
}

int sweep(int64_t cases, uint64_t seed) {
    std::vector<Case> all = edges();
    std::mt19937_64 random(seed);
    while (static_cast<int64_t>(all.size()) < cases) all.push_back(draw(random));
    int failures = 0;
    const auto report = [&](const std::string& what, const std::string& problem) {
        if (!problem.empty() && ++failures <= 10) std::printf("FAIL %s\n     %s\n", what.c_str(), problem.c_str());
    };
    for (const Case& c : all) report(describe(c), check(c, random()));
    for (Case c : all) {
        // Rows of a few tokens each, and more of one adapter than are computed together.
        const auto rows = static_cast<int64_t>(1 + random() % 6);
        if (random() % 8) c.tokens = (c.tokens + rows - 1) / rows;
        report(describe(c) + ", rows " + std::to_string(rows), check_slots(c, rows, random()));
    }
    for (const DataType type : {DataType::kFloat16, DataType::kBFloat16}) report("ties", check_ties(type));
    report("eight threads", check_threads());
    std::string names;
    for (const Code* code : available_codes()) names += std::string(" ") + code->name;
    std::printf("%zu cases, %d failures;%s\n", all.size(), failures, names.c_str());
    return failures ? 1 : 0;
}

}  // namespace
}  // namespace teamlora::cpu

int main(int argc, char** argv) {
    int64_t cases = 300;
    uint64_t seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (std::string(argv[i]) == "--cases") cases = std::atoll(argv[i + 1]);
        if (std::string(argv[i]) == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    }
    return teamlora::cpu::sweep(cases, seed);
}
