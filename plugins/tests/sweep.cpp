// The kernels, emulated, against the formula in double precision, over many shapes: edges first, then drawn at random.
//
//     sweep [--cases N] [--seed S]
//
// Outputs and workspace start as NaN, and lie between guard bytes. z, v and y must be rounded where the definition
// rounds, and nowhere else: what is allowed beyond that is float32's own error, in any order of sums. Prints the first
// failures and exits with 1 where there are any.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../kernels/plan.h"
#include "emulation.h"

namespace teamlora {
namespace {

constexpr double kFloatRoundoff = 1.0 / (1 << 24);
// More than any number here; an error without a bound would become NaN.
constexpr double kAnything = 1e30;

// An array of the op's dtype in memory of its own, with guards before and behind.
class Array {
public:
    Array(DataType dtype, size_t count, size_t misalignment = 0)
        : dtype_(dtype), offset_(kGuard + misalignment), bytes_(count * element_size(dtype)) {
        if (posix_memalign(&memory_, 256, offset_ + bytes_ + kGuard) != 0) throw std::bad_alloc();
        std::memset(memory_, kPattern, offset_ + bytes_ + kGuard);
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { std::free(memory_); }

    void* data() const { return static_cast<char*>(memory_) + offset_; }
    double get(size_t i) const {
        if (dtype_ == DataType::kFloat32) return static_cast<const float*>(data())[i];
        if (dtype_ == DataType::kFloat16) return static_cast<float>(static_cast<const __half*>(data())[i]);
        return static_cast<float>(static_cast<const __nv_bfloat16*>(data())[i]);
    }
    void set(size_t i, double value) {
        const auto narrow = static_cast<float>(value);
        if (dtype_ == DataType::kFloat32) static_cast<float*>(data())[i] = narrow;
        if (dtype_ == DataType::kFloat16) static_cast<__half*>(data())[i] = __float2half_rn(narrow);
        if (dtype_ == DataType::kBFloat16) static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(narrow);
    }
    bool guards_intact() const {
        const auto* all = static_cast<const unsigned char*>(memory_);
        const auto intact = [&](size_t from, size_t to) {
            return std::all_of(all + from, all + to, [](unsigned char byte) { return byte == kPattern; });
        };
        return intact(0, offset_) && intact(offset_ + bytes_, offset_ + bytes_ + kGuard);
    }

private:
    // 0xFF is NaN in every type.
    static constexpr unsigned char kPattern = 0xFF;
    static constexpr size_t kGuard = 256;
    DataType dtype_;
    size_t offset_, bytes_;
    void* memory_ = nullptr;
};

struct Case {
    MixedExpertShape shape;
    bool in_place = false;
    bool misaligned = false;
    uint64_t schedule = 0;
};

std::string describe(const Case& tried) {
    const MixedExpertShape& s = tried.shape;
    std::string text = "dtype " + std::to_string(static_cast<int>(s.dtype)) + ", tokens " + std::to_string(s.tokens) +
                       ", in " + std::to_string(s.in) + ", k " + std::to_string(s.num_experts) + ", c " +
                       std::to_string(s.expert_rank) + (s.shared_down ? ", shared" : "") + ", out";
    for (int g = 0; g < s.num_siblings; ++g) text += " " + std::to_string(s.out_splits[g]);
    if (tried.in_place) text += ", in place";
    if (tried.misaligned) text += ", misaligned";
    return text + ", schedule " + std::to_string(tried.schedule);
}

struct Inputs {
    const Array &x, &base, &down, &up;
    const std::vector<float>& mix;
};

// A number of the definition as double arithmetic finds it, and how far float32 arithmetic may be from it.
struct Value {
    double value = 0, error = 0;
};

double round_to(DataType dtype, double value) {
    const auto narrow = static_cast<float>(value);
    if (dtype == DataType::kFloat16) return static_cast<float>(__float2half_rn(narrow));
    if (dtype == DataType::kBFloat16) return static_cast<float>(__float2bfloat16_rn(narrow));
    return narrow;
}

// Where the definition rounds to T. No error is left, unless `error` reaches over the border between two numbers of T.
Value rounded(DataType dtype, const Value& exact) {
    const double value = round_to(dtype, exact.value);
    if (dtype == DataType::kFloat32) return {value, exact.error + kFloatRoundoff * std::abs(value)};
    const double error = std::max(round_to(dtype, exact.value + exact.error) - value,
                                  value - round_to(dtype, exact.value - exact.error));
    return {value, std::min(error, kAnything)};
}

// Routing weights of one token and sibling, from rounded logits.
std::vector<Value> route(const MixedExpertShape& s, const Value* logits, const float* mix) {
    const int k = s.num_experts;
    const Value* largest = std::max_element(logits, logits + k, [](auto& a, auto& b) { return a.value < b.value; });
    std::vector<Value> w(k);
    Value sum;
    for (int to = 0; to < k; ++to) {
        for (int from = 0; from < k; ++from) {
            const double distance = logits[from].value - largest->value;
            const double term = std::exp(distance) * mix[from * k + to];
            const double relative = logits[from].error + largest->error + (k + 8 + std::abs(distance)) * kFloatRoundoff;
            w[to].value += term;
            w[to].error += std::expm1(relative) * std::abs(term);
        }
        sum.value += w[to].value;
        sum.error += w[to].error + k * kFloatRoundoff * std::abs(w[to].value);
    }
    for (Value& weight : w) {
        weight.value /= sum.value;
        const double least = std::max(std::abs(sum.value) - sum.error, 1e-300);
        weight.error = (weight.error + std::abs(weight.value) * (sum.error + 3 * kFloatRoundoff * least)) / least;
        weight.error = std::min(weight.error, kAnything);
    }
    return w;
}

// One token of one sibling, as the op is defined, for each column of y.
void reference(const MixedExpertShape& s, const Inputs& in, int64_t token, int g, Value* y) {
    const int a = s.down_rank(), k = s.num_experts, c = s.expert_rank, rows = s.sibling_rows(), out = s.out();
    std::vector<Value> z(rows), v(s.up_rank());
    for (int row = 0; row < rows; ++row) {
        Value sum;
        for (int i = 0; i < s.in; ++i) {
            const double term =
                in.x.get(token * s.in + i) * in.down.get((static_cast<size_t>(g) * rows + row) * s.in + i);
            sum.value += term;
            sum.error += (s.in + 8) * kFloatRoundoff * std::abs(term);
        }
        z[row] = rounded(s.dtype, sum);
    }
    const std::vector<Value> w = route(s, &z[a], &in.mix[static_cast<size_t>(g) * k * k]);
    for (int row = 0; row < s.up_rank(); ++row) {
        const Value &u = z[s.shared_down ? row % c : row], &weight = w[row / c];
        const double product = u.value * weight.value;
        const double error = std::abs(u.value) * weight.error + std::abs(weight.value) * u.error +
                             u.error * weight.error + kFloatRoundoff * std::abs(product);
        v[row] = rounded(s.dtype, {product, error});
    }
    const int first = std::accumulate(s.out_splits, s.out_splits + g, 0);
    for (int column = first; column < first + s.out_splits[g]; ++column) {
        Value sum{in.base.get(token * out + column), 0};
        double size = std::abs(sum.value);
        for (int row = 0; row < s.up_rank(); ++row) {
            const double up = in.up.get(static_cast<size_t>(row) * out + column);
            sum.value += v[row].value * up;
            sum.error += v[row].error * std::abs(up);
            size += (std::abs(v[row].value) + v[row].error) * std::abs(up);
        }
        sum.error += (s.up_rank() + 8) * kFloatRoundoff * size;
        y[column] = sum;
    }
}

// An empty string, or what is wrong.
std::string check(const Case& tried, std::mt19937_64& generator) {
    const MixedExpertShape& s = tried.shape;
    const auto tokens = static_cast<size_t>(s.tokens);
    const size_t offset = tried.misaligned ? element_size(s.dtype) : 0;
    Array x(s.dtype, tokens * s.in, offset), base(s.dtype, tokens * s.out(), offset),
        down(s.dtype, size_t(s.rows()) * s.in), up(s.dtype, size_t(s.up_rank()) * s.out()),
        y(s.dtype, tokens * s.out());
    std::normal_distribution<double> normal;
    const auto fill = [&](Array& array, size_t count, double scale) {
        for (size_t i = 0; i < count; ++i) array.set(i, scale * normal(generator));
    };
    fill(x, tokens * s.in, 1);
    fill(base, tokens * s.out(), 0.5);
    fill(down, size_t(s.rows()) * s.in, 1 / std::sqrt(s.in));
    fill(up, size_t(s.up_rank()) * s.out(), 1);
    std::vector<float> mix(static_cast<size_t>(s.num_siblings) * s.num_experts * s.num_experts);
    const int k = s.num_experts;
    for (size_t i = 0; i < mix.size(); ++i) {
        const bool diagonal = i % (k * k) / k == i % k;
        mix[i] = static_cast<float>((diagonal ? 1 : 0) + 0.3 / k * normal(generator));
    }
    std::vector<Value> expected(tokens * s.out());
    for (size_t token = 0; token < tokens; ++token) {
        for (int g = 0; g < s.num_siblings; ++g) {
            reference(s, {x, base, down, up, mix}, static_cast<int64_t>(token), g, &expected[token * s.out()]);
        }
    }
    const size_t bytes = workspace_bytes(s);
    if (bytes > workspace_bound(s)) return "the workspace is larger than its bound";
    const Array workspace(DataType::kFloat32, (bytes + 3) / 4);
    const Array& target = tried.in_place ? base : y;
    const MixedExpertTensors tensors{x.data(), base.data(), down.data(), mix.data(), up.data(), target.data()};
    emulation::set_schedule(tried.schedule);
    try {
        if (launch(s, tensors, workspace.data(), nullptr) != cudaSuccess) return "the launch failed";
    } catch (const std::exception& error) {
        return error.what();
    }
    for (const Array* array : std::initializer_list<const Array*>{&x, &base, &down, &up, &y, &workspace}) {
        if (!array->guards_intact()) return "something was written outside of an array";
    }
    for (size_t i = 0; i < expected.size(); ++i) {
        const auto& [value, error] = expected[i];
        const double least = round_to(s.dtype, value - error), most = round_to(s.dtype, value + error);
        // Written so that NaN fails.
        if (!(target.get(i) >= least && target.get(i) <= most)) {
            char text[160];
            std::snprintf(text, sizeof(text), "token %zu, column %zu: %.9g, allowed %.9g to %.9g", i / s.out(),
                          i % s.out(), target.get(i), least, most);
            return text;
        }
    }
    return "";
}

MixedExpertShape make(DataType dtype, int64_t tokens, int in, int k, int c, bool shared, std::vector<int> out) {
    MixedExpertShape shape{dtype, tokens, in, k, c, shared, static_cast<int32_t>(out.size()), {}};
    std::copy(out.begin(), out.end(), shape.out_splits);
    return shape;
}

// Sizes at which something changes: paths, tiles, splits, tails, alignment.
std::vector<Case> edges() {
    std::vector<Case> cases;
    for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        const auto add = [&](int64_t tokens, int in, int k, int c, bool shared, std::vector<int> out,
                             bool in_place = false, bool misaligned = false) {
            cases.push_back(
                {make(dtype, tokens, in, k, c, shared, std::move(out)), in_place, misaligned, cases.size() % 5});
        };
        for (const int64_t tokens : {0, 1, 2, 4, 5, 8, 9, 31, 32, 33, 64, 65}) add(tokens, 64, 4, 2, false, {32});
        add(1, 576, 4, 8, false, {576, 192, 192});  // SmolLM2's q/k/v
        add(40, 576, 4, 8, false, {576, 192, 192});
        add(3, 2048, 4, 2, false, {136});           // slices of `in`
        add(35, 1100, 4, 2, false, {136, 8});       // splits of `in`, with a tail
        add(40, 521, 3, 3, false, {13, 1, 7, 29});  // nothing divides anything
        add(7, 521, 3, 3, false, {13, 1, 7, 29});
        add(40, 64, 4, 30, false, {130});    // chunks of columns
        add(40, 64, 32, 4, true, {16, 24});  // many experts, all read the whole of u
        add(6, 64, 32, 4, true, {16, 24});
        add(40, 48, 1, 8, false, {64});  // plain LoRA
        add(1, 1, 1, 1, false, {1});
        add(33, 1, 1, 1, false, {1});
        add(34, 96, 2, 8, false, {64}, true);  // y is base
        add(5, 96, 2, 8, false, {64}, true);
        add(34, 96, 2, 8, false, {64}, false, true);  // x and base off 16 bytes
        add(5, 96, 2, 8, false, {64}, false, true);
    }
    cases.push_back({make(DataType::kFloat16, 8200, 8, 2, 2, false, {8}), false, false, 2});  // large token tiles
    cases.push_back({make(DataType::kFloat16, 1100, 32, 4, 16, false, {24, 8, 8, 8}), false, false, 3});
    cases.push_back({make(DataType::kFloat16, 2, 8, 4, 300, false, {16}), false, false, 4});  // one token a block
    cases.push_back({make(DataType::kFloat32, 2100, 24, 4, 8, false, {8, 8, 8, 8}), false, false, 1});
    return cases;
}

Case draw(std::mt19937_64& generator) {
    const auto below = [&](int count) { return static_cast<int>(generator() % count); };
    const auto size = [&](int most) {
        return below(3) == 0 ? 1 + below(most) : std::max(8, 8 * (1 + below(most / 8)));
    };
    const int k = 1 << below(6), siblings = 1 + below(4);
    std::vector<int> out;
    for (int g = 0; g < siblings; ++g) out.push_back(size(160));
    Case drawn;
    drawn.shape = make(static_cast<DataType>(below(3)), below(2) == 0 ? 1 + below(32) : 33 + below(60), size(640),
                       below(4) == 0 ? 1 + below(32) : k, 1 + below(k > 8 ? 4 : 16), below(3) == 0, out);
    drawn.in_place = below(3) == 0;
    drawn.misaligned = below(4) == 0;
    drawn.schedule = generator() % 1000;
    return drawn;
}

int run(int cases, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::vector<Case> all = edges();
    for (int i = 0; i < cases; ++i) all.push_back(draw(generator));
    int failures = 0;
    for (const Case& tried : all) {
        const std::string problem = check(tried, generator);
        if (problem.empty()) continue;
        std::printf("FAILED: %s\n    %s\n", describe(tried).c_str(), problem.c_str());
        if (++failures == 5) break;
    }
    std::printf("%zu cases, %d failures\n", all.size(), failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace teamlora

int main(int count, char** arguments) {
    int cases = 100;
    uint64_t seed = 1;
    for (int i = 1; i + 1 < count; i += 2) {
        const std::string option = arguments[i];
        if (option == "--cases") cases = std::atoi(arguments[i + 1]);
        if (option == "--seed") seed = std::strtoull(arguments[i + 1], nullptr, 10);
    }
    return teamlora::run(cases, seed);
}
