// The kernels, emulated or on a GPU, against the formula in double precision, over many shapes: edges first, then drawn
// at random.
//
//     sweep [--cases N] [--seed S] [--small] [--only KIND]... [--first] [--no-poison]
//
// Outputs and workspace start as NaN, and lie between guard bytes. z, v and y must be rounded where the definition
// rounds, and nowhere else: what is allowed beyond that is float32's own error, in any order of sums. Prints the first
// failures and exits with 1 where there are any. --small: some of the edges, one of a kind. --only: edges of
// a kind: adapters, one-adapter, few, many, fp16. --first: the cheapest first, until one fails. --no-poison: outputs
// and workspace are left as they were allocated, for a tool that looks for what is read before it is written.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kernels/plan.h"
#include "device_memory.h"

namespace teamlora {
namespace {

constexpr double kFloatRoundoff = 1.0 / (1 << 24);
// More than any number here; an error without a bound would become NaN.
constexpr double kAnything = 1e30;

bool poison = true;

// An array of the op's dtype in memory of its own, with guards before and behind: on the host, and where the kernels
// see it.
class Array {
public:
    Array(DataType dtype, size_t count, size_t misalignment = 0)
        : dtype_(dtype), offset_(kGuard + misalignment), bytes_(count * element_size(dtype)) {
        if (posix_memalign(&memory_, 256, size()) != 0) throw std::bad_alloc();
        std::memset(memory_, kPattern, size());
        device_ = device_memory::allocate(memory_, size());
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() {
        device_memory::release(device_);
        std::free(memory_);
    }

    void* device() const { return static_cast<char*>(device_) + offset_; }
    double get(size_t i) const {
        if (dtype_ == DataType::kFloat32) return static_cast<const float*>(data())[i];
        if (dtype_ == DataType::kFloat16) return __half2float(static_cast<const __half*>(data())[i]);
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data())[i]);
    }
    // All of them: the formula needs each many times.
    std::vector<double> numbers() const {
        std::vector<double> all(bytes_ / element_size(dtype_));
        for (size_t i = 0; i < all.size(); ++i) all[i] = get(i);
        return all;
    }
    void set(size_t i, double value) {
        const auto narrow = static_cast<float>(value);
        if (dtype_ == DataType::kFloat32) static_cast<float*>(data())[i] = narrow;
        if (dtype_ == DataType::kFloat16) static_cast<__half*>(data())[i] = __float2half_rn(narrow);
        if (dtype_ == DataType::kBFloat16) static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(narrow);
    }
    void set_integer(size_t i, int32_t value) { static_cast<int32_t*>(data())[i] = value; }
    // All of it, guards too.
    void upload() const { device_memory::upload(device_, memory_, size()); }
    void download(bool guards) {
        if (guards) return device_memory::download(memory_, device_, size());
        device_memory::download(data(), device(), bytes_);
    }
    bool guards_intact() const {
        const auto* all = static_cast<const unsigned char*>(memory_);
        const auto intact = [&](size_t from, size_t to) {
            return std::all_of(all + from, all + to, [](unsigned char byte) { return byte == kPattern; });
        };
        return intact(0, offset_) && intact(offset_ + bytes_, size());
    }

private:
    // 0xFF is NaN in every type.
    static constexpr unsigned char kPattern = 0xFF;
    static constexpr size_t kGuard = 256;

    void* data() const { return static_cast<char*>(memory_) + offset_; }
    size_t size() const { return offset_ + bytes_ + kGuard; }

    DataType dtype_;
    size_t offset_, bytes_;
    void *memory_ = nullptr, *device_ = nullptr;
};

struct Case {
    MixedExpertShape shape;
    Tuning tuning;
    bool in_place = false;
    // A bit for each of x, base, down, up and y that is not at a multiple of 16 bytes.
    int misaligned = 0;
    uint64_t schedule = 0;
    // Where there are slots: the index of each row's adapter.
    std::vector<int32_t> adapter = {};

    int64_t slot_of(int64_t token) const { return adapter.empty() ? 0 : adapter[token / shape.row_tokens]; }
};

std::string describe(const Case& tried) {
    const MixedExpertShape& s = tried.shape;
    std::string text = "dtype " + std::to_string(static_cast<int>(s.dtype)) + ", tokens " + std::to_string(s.tokens) +
                       ", in " + std::to_string(s.in) + ", k " + std::to_string(s.num_experts) + ", c " +
                       std::to_string(s.expert_rank) + (s.shared_down ? ", shared" : "") + ", out";
    for (int g = 0; g < s.num_siblings; ++g) text += " " + std::to_string(s.out_splits[g]);
    if (tried.in_place) text += ", in place";
    if (tried.misaligned != 0) text += ", misaligned " + std::to_string(tried.misaligned);
    text += ", " + std::to_string(tried.tuning.multiprocessors) + " multiprocessors";
    if (s.slots > 0) text += ", " + std::to_string(s.slots) + " slots, adapters";
    for (const int32_t index : tried.adapter) text += " " + std::to_string(index);
    return text + ", schedule " + std::to_string(tried.schedule);
}

// The numbers of a call, of all slots' weights.
struct Inputs {
    std::vector<double> x, base, down, up, mix;
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

// Routing weights of one token and sibling, from rounded logits. Where there are slots, experts whose row of `mix` is
// all zeros take no part; where none does, all weights are zero.
std::vector<Value> route(const MixedExpertShape& s, const Value* logits, const double* of_sibling) {
    const int k = s.num_experts;
    const auto mix = [&](int from, int to) { return of_sibling[from * k + to]; };
    std::vector<int> experts;
    for (int from = 0; from < k; ++from) {
        bool takes_part = s.slots == 0;
        for (int to = 0; to < k; ++to) takes_part |= mix(from, to) != 0;
        if (takes_part) experts.push_back(from);
    }
    std::vector<Value> w(k);
    if (experts.empty()) return w;
    const int most = *std::max_element(experts.begin(), experts.end(),
                                       [&](int a, int b) { return logits[a].value < logits[b].value; });
    Value sum;
    for (int to = 0; to < k; ++to) {
        for (const int from : experts) {
            const double distance = logits[from].value - logits[most].value;
            const double term = std::exp(distance) * mix(from, to);
            const double relative =
                logits[from].error + logits[most].error + (k + 8 + std::abs(distance)) * kFloatRoundoff;
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

// One token of one sibling with the adapter in `slot`, as the op is defined, for each column of y.
void reference(const MixedExpertShape& s, const Inputs& in, int64_t token, size_t slot, int g, Value* y) {
    const int a = s.down_rank(), c = s.expert_rank, rows = s.sibling_rows(), out = s.out(), k = s.num_experts;
    const size_t sibling = slot * s.num_siblings + g;
    const double *x = &in.x[token * s.in], *down = &in.down[sibling * rows * s.in];
    const double* up = &in.up[slot * s.up_rank() * out];
    std::vector<Value> z(rows), v(s.up_rank());
    for (int row = 0; row < rows; ++row) {
        Value sum;
        for (int i = 0; i < s.in; ++i) {
            const double term = x[i] * down[static_cast<size_t>(row) * s.in + i];
            sum.value += term;
            sum.error += (s.in + 8) * kFloatRoundoff * std::abs(term);
        }
        z[row] = rounded(s.dtype, sum);
    }
    const std::vector<Value> w = route(s, &z[a], &in.mix[sibling * k * k]);
    for (int row = 0; row < s.up_rank(); ++row) {
        const Value &u = z[s.shared_down ? row % c : row], &weight = w[row / c];
        const double product = u.value * weight.value;
        const double error = std::abs(u.value) * weight.error + std::abs(weight.value) * u.error +
                             u.error * weight.error + kFloatRoundoff * std::abs(product);
        v[row] = rounded(s.dtype, {product, error});
    }
    const int first = std::accumulate(s.out_splits, s.out_splits + g, 0);
    for (int column = first; column < first + s.out_splits[g]; ++column) {
        Value sum{in.base[token * out + column], 0};
        double size = std::abs(sum.value);
        for (int row = 0; row < s.up_rank(); ++row) {
            const double weight = up[static_cast<size_t>(row) * out + column];
            sum.value += v[row].value * weight;
            sum.error += v[row].error * std::abs(weight);
            size += (std::abs(v[row].value) + v[row].error) * std::abs(weight);
        }
        sum.error += (s.up_rank() + 8) * kFloatRoundoff * size;
        y[column] = sum;
    }
}

// Every slot that a row has is filled; the others stay NaN, as if nobody had written to them. Of some slots' siblings
// experts are padding, of which everything but `mix` may hold anything: here logits beyond all others.
void fill_weights(const Case& tried, Array& down, Array& mix, Array& up, std::mt19937_64& generator) {
    const MixedExpertShape& s = tried.shape;
    std::normal_distribution<double> normal;
    const int k = s.num_experts, a = s.down_rank();
    for (int slot = 0; slot < std::max(s.slots, 1); ++slot) {
        if (s.slots > 0 && std::count(tried.adapter.begin(), tried.adapter.end(), slot) == 0) continue;
        for (int g = 0; g < s.num_siblings; ++g) {
            const int padding = s.slots > 0 && generator() % 2 == 0 ? static_cast<int>(generator() % (k + 1)) : 0;
            const size_t sibling = static_cast<size_t>(slot) * s.num_siblings + g;
            for (int i = 0; i < k * k; ++i) {
                const bool present = i / k >= padding && i % k >= padding;
                const double value = (i / k == i % k ? 1 : 0) + 0.3 / k * normal(generator);
                mix.set(sibling * k * k + i, present ? value : 0);
            }
            for (int i = 0; i < s.sibling_rows() * s.in; ++i) {
                const int expert = i / s.in - a;
                const double scale = expert >= 0 && expert < padding ? 60 : 1;
                down.set(sibling * s.sibling_rows() * s.in + i, scale * normal(generator) / std::sqrt(s.in));
            }
        }
        const size_t count = static_cast<size_t>(s.up_rank()) * s.out();
        for (size_t i = 0; i < count; ++i) up.set(slot * count + i, normal(generator));
    }
}

// y of one token, for each column: what it may be; both NaN where the row's index is that of no slot.
void expect(const Case& tried, const Inputs& in, int64_t token, Value* y) {
    const MixedExpertShape& s = tried.shape;
    const int64_t slot = tried.slot_of(token);
    if (slot >= 0 && slot < std::max(s.slots, 1)) {
        for (int g = 0; g < s.num_siblings; ++g) reference(s, in, token, static_cast<size_t>(slot), g, y);
        return;
    }
    for (int column = 0; column < s.out(); ++column) {
        y[column] = {slot < 0 ? in.base[token * s.out() + column] : NAN, 0};
    }
}

// An empty string, or what is wrong.
std::string check(const Case& tried, std::mt19937_64& generator) {
    const MixedExpertShape& s = tried.shape;
    const auto tokens = static_cast<size_t>(s.tokens), slots = static_cast<size_t>(std::max(s.slots, 1));
    const auto offset = [&](int n) { return static_cast<size_t>((tried.misaligned >> n & 1) * element_size(s.dtype)); };
    const int k = s.num_experts;
    Array x(s.dtype, tokens * s.in, offset(0)), base(s.dtype, tokens * s.out(), offset(1)),
        down(s.dtype, slots * s.rows() * s.in, offset(2)), up(s.dtype, slots * s.up_rank() * s.out(), offset(3)),
        y(s.dtype, tokens * s.out(), offset(4)), mix(DataType::kFloat32, slots * s.num_siblings * k * k),
        adapter(DataType::kFloat32, tried.adapter.size());
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < tokens * s.in; ++i) x.set(i, normal(generator));
    for (size_t i = 0; i < tokens * s.out(); ++i) base.set(i, 0.5 * normal(generator));
    for (size_t i = 0; i < tried.adapter.size(); ++i) adapter.set_integer(i, tried.adapter[i]);
    fill_weights(tried, down, mix, up, generator);
    const Inputs inputs{x.numbers(), base.numbers(), down.numbers(), up.numbers(), mix.numbers()};
    std::vector<Value> expected(tokens * s.out());
    for (size_t token = 0; token < tokens; ++token) {
        expect(tried, inputs, static_cast<int64_t>(token), &expected[token * s.out()]);
    }
    const size_t bytes = workspace_bytes(s, tried.tuning);
    if (bytes > workspace_bound(s, tried.tuning)) return "the workspace is larger than its bound";
    Array workspace(DataType::kFloat32, (bytes + 3) / 4);
    Array& target = tried.in_place ? base : y;
    for (const Array* array : std::initializer_list<const Array*>{&x, &base, &down, &mix, &up, &adapter})
        array->upload();
    if (poison) {
        y.upload();
        workspace.upload();
    }
    const MixedExpertTensors tensors{x.device(),
                                     base.device(),
                                     down.device(),
                                     static_cast<const float*>(mix.device()),
                                     up.device(),
                                     target.device(),
                                     static_cast<const int32_t*>(adapter.device())};
    device_memory::set_schedule(tried.schedule);
    try {
        const cudaError_t error = launch(s, tried.tuning, tensors, workspace.device(), nullptr);
        if (error != cudaSuccess) return std::string("the launch failed: ") + cudaGetErrorString(error);
        device_memory::finish();
    } catch (const std::exception& error) {
        return error.what();
    }
    if (!poison) {
        target.download(false);
    } else {
        for (Array* array : std::initializer_list<Array*>{&x, &base, &down, &mix, &up, &y, &adapter, &workspace}) {
            array->download(true);
            if (!array->guards_intact()) return "something was written outside of an array";
        }
    }
    for (size_t i = 0; i < expected.size(); ++i) {
        const auto& [value, error] = expected[i];
        if (std::isnan(value) && std::isnan(target.get(i))) continue;
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

Tuning tuning_of(int multiprocessors) {
    Tuning tuning;
    tuning.multiprocessors = multiprocessors;
    tuning.overlaps = true;
    return tuning;
}

// Both of the schedules that are no chance, and many that are.
uint64_t schedule_of(size_t number) { return number % 5 < 2 ? number % 5 : number; }

// `adapter`: an index for each row of `row_tokens` tokens.
Case with_slots(Case made, int slots, int64_t row_tokens, std::vector<int32_t> adapter) {
    made.shape.slots = slots;
    made.shape.row_tokens = row_tokens;
    made.shape.tokens = row_tokens * static_cast<int64_t>(adapter.size());
    made.adapter = std::move(adapter);
    return made;
}

// Several adapters: mixed and alone, rows without one, wrong indices; groups, tiles and rows that end in the middle.
void add_adapters(std::vector<Case>& cases) {
    for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        const auto add = [&](int slots, int64_t row_tokens, std::vector<int32_t> adapter,
                             MixedExpertShape shape = {}) -> Case& {
            if (shape.in == 0) shape = make(dtype, 0, 96, 4, 2, false, {40, 24});
            Case made{shape, tuning_of(16), false, 0, schedule_of(cases.size()), {}};
            cases.push_back(with_slots(made, slots, row_tokens, std::move(adapter)));
            return cases.back();
        };
        add(2, 1, {1});
        add(2, 1, {-1});
        add(2, 0, {0, 1});
        add(8, 1, {7, 0, 6, 1, 5, 2, 4, 3});                               // all different
        add(3, 1, {2, 2, 2, 2, 2, 2, 2, 2});                               // all the same
        add(3, 1, {1, -1, 0, 1, 1, 2, 1, 1, -7, 1, 0, 1, 1, 1, 1, 1, 1});  // more of one than a tile holds
        add(3, 3, {0, 2, -1, 3, 0, 2, INT32_MAX, INT32_MIN, 0, 1}).in_place = true;
        add(4, 2, std::vector<int32_t>(40, 3));                            // short rows, beyond what few tokens are
        add(2, 1, {1}, make(dtype, 0, 521, 3, 3, false, {13, 1, 7, 29}));  // nothing divides anything
        add(5, 7, {4, 3, -1, 1, 0, 4, 3}, make(dtype, 0, 521, 3, 3, false, {13, 1, 7, 29}));
        add(3, 50, {1, -1, 2, 3, 0, 1});  // many tokens
        add(2, 130, {-1, 1}, make(dtype, 0, 200, 4, 16, true, {136, 8})).in_place = true;
        add(2, 65, {1}, make(dtype, 0, 1100, 4, 12, false, {24, 24, 16, 16}));
        add(3, 20, {2, 0, 2}, make(dtype, 0, 521, 3, 3, false, {13, 1, 7, 29}));
        add(2, 2, {1, 0, 1, -1}, make(dtype, 0, 64, 32, 4, true, {16, 24}));  // many experts
        add(2, 1, {0, 1, 0}, make(dtype, 0, 64, 4, 150, false, {16}));        // no room for eight tokens
        add(2, 1, {1, 1, 0}, make(dtype, 0, 64, 4, 300, false, {16})).misaligned = 8;
        for (int n = 0; n < 5; ++n) {
            add(2, 17, {1, 0, -1}).misaligned = 1 << n;
            add(2, 2, {1, 0, -1}).misaligned = 1 << n;
        }
        // Rows that are few tokens each, by the path for many.
        add(3, 2, {2, 0, 1, 0, -1, 2}).tuning.few_tokens = 0;
    }
    Case all{make(DataType::kFloat16, 0, 32, 2, 2, false, {16}), tuning_of(132), false, 0, 3, {}};
    std::vector<int32_t> adapter(300);
    for (size_t row = 0; row < adapter.size(); ++row) adapter[row] = static_cast<int32_t>(row * row % 101) - 1;
    cases.push_back(with_slots(all, 100, 1, adapter));
}

// Sizes at which something changes: paths, tiles, splits, tails, alignment.
std::vector<Case> edges() {
    std::vector<Case> cases;
    for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        const auto add = [&](int64_t tokens, int in, int k, int c, bool shared, std::vector<int> out,
                             bool in_place = false, int misaligned = 0) {
            Case made{
                make(dtype, tokens, in, k, c, shared, std::move(out)), tuning_of(16), in_place, misaligned, 0, {}};
            made.schedule = schedule_of(cases.size());
            cases.push_back(made);
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
        for (int n = 0; n < 5; ++n) {
            add(34, 96, 2, 8, false, {64}, false, 1 << n);
            add(5, 96, 2, 8, false, {64}, false, 1 << n);
        }
    }
    const auto add = [&](DataType dtype, int64_t tokens, int in, int k, int c, std::vector<int> out, int processors) {
        const MixedExpertShape shape = make(dtype, tokens, in, k, c, false, std::move(out));
        cases.push_back({shape, tuning_of(processors), false, 0, schedule_of(cases.size()), {}});
    };
    add(DataType::kFloat16, 8200, 8, 2, 2, {8}, 132);  // more blocks of tokens than a GPU holds
    add(DataType::kFloat16, 1100, 32, 4, 16, {24, 8, 8, 8}, 132);
    add(DataType::kFloat16, 2, 8, 4, 300, {16}, 132);   // one token a block
    add(DataType::kFloat16, 40, 2304, 2, 2, {8}, 192);  // more parts of z than are asked for at a time
    add(DataType::kFloat16, 1, 16640, 2, 2, {8}, 132);  // the most slices, each of two rounds
    // More rows of `up` than are under way ahead, for each tile of tokens.
    for (const int64_t tokens : {1, 3, 6}) add(DataType::kFloat16, tokens, 64, 4, 70, {72}, 16);
    for (const int64_t tokens : {1, 3, 6}) add(DataType::kFloat32, tokens, 64, 4, 70, {21, 44}, 16);
    add(DataType::kFloat32, 2100, 24, 4, 8, {8, 8, 8, 8}, 1);
    add_adapters(cases);
    // Each width of the first product's tiles: 1, 3, 5, 7 and 9 of 16 columns.
    for (const int c : {1, 3, 8, 12, 16}) {
        for (const DataType dtype : {DataType::kFloat32, DataType::kFloat16}) {
            add(dtype, 70, 200, 2, c, {24, 24, 16, 16}, 1);
        }
    }
    // Packs cut by a sibling's end, and more of them than are under way ahead.
    add(DataType::kFloat16, 3, 64, 4, 70, {21, 44}, 16);
    // Full tiles: the very first copy, of the last row, comes before another kernel could have run.
    add(DataType::kFloat16, 64, 64, 4, 8, {24}, 16);
    cases.back().schedule = 1;
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
    constexpr int kMultiprocessors[] = {1, 16, 132, 1000};
    drawn.tuning = tuning_of(kMultiprocessors[below(4)]);
    // What belongs to one path is sometimes given to the other.
    if (below(4) == 0) drawn.tuning.few_tokens = 64 * below(2);
    drawn.in_place = below(3) == 0;
    if (below(4) == 0) drawn.misaligned = 1 + below(31);
    drawn.schedule = generator() % 1000;
    if (below(2) == 0) return drawn;
    const int slots = 1 + below(5);
    std::vector<int32_t> adapter(1 + below(below(2) == 0 ? 3 : 20));
    for (int32_t& index : adapter) index = below(slots + 2) - 1;
    const int64_t most = std::max<int64_t>(drawn.shape.tokens / static_cast<int64_t>(adapter.size()), 1);
    return with_slots(drawn, slots, most, adapter);
}

// Whether kernels begin before those ahead of them have ended is the GPU's to say.
bool device_overlaps() {
    Tuning tuning;
    return tuning_of_device(tuning) == cudaSuccess && tuning.overlaps;
}

struct Options {
    int cases = -1;
    uint64_t seed = 1;
    bool small = false, first = false;
    std::vector<std::string> kinds = {};
};

bool is_of(const std::string& kind, const Case& tried) {
    if (kind == "adapters") return tried.shape.slots > 0;
    if (kind == "one-adapter") return tried.shape.slots == 0;
    if (kind == "few") return takes_few(tried.shape, tried.tuning);
    if (kind == "many") return !takes_few(tried.shape, tried.tuning);
    if (kind == "fp16") return tried.shape.dtype == DataType::kFloat16;
    std::fprintf(stderr, "no kind: %s\n", kind.c_str());
    std::exit(2);
}

// Products in the definition.
int64_t cost(const Case& tried) {
    const MixedExpertShape& s = tried.shape;
    return s.tokens * (int64_t{s.rows()} * s.in + int64_t{s.up_rank()} * s.out());
}

int run(const Options& options) {
    std::mt19937_64 generator(options.seed);
    std::vector<Case> all = edges();
    if (options.small) {
        // Every seventh; of those with slots, which come in the same 28 forms for each type, every fifth, so that all
        // types together take other forms.
        std::vector<Case> some;
        for (size_t i = 0, slots = 0; i < all.size(); ++i) {
            const bool has_slots = all[i].shape.slots > 0;
            const bool taken = has_slots ? slots++ % 5 == 0 : i % 7 == 0;
            if (taken && all[i].shape.tokens <= (has_slots ? 300 : 100)) some.push_back(all[i]);
        }
        all = some;
    }
    for (const std::string& kind : options.kinds) {
        all.erase(std::remove_if(all.begin(), all.end(), [&](const Case& one) { return !is_of(kind, one); }),
                  all.end());
    }
    const int cases = options.cases >= 0 ? options.cases : options.small ? 0 : 100;
    for (int i = 0; i < cases; ++i) all.push_back(draw(generator));
    if (options.first) {
        std::stable_sort(all.begin(), all.end(), [](const Case& a, const Case& b) { return cost(a) < cost(b); });
    }
    const bool overlaps = device_overlaps();
    int failures = 0;
    for (Case& tried : all) {
        tried.tuning.overlaps &= overlaps;
        std::string problem;
        try {
            problem = check(tried, generator);
        } catch (const std::exception& error) {
            problem = error.what();
        }
        if (problem.empty()) continue;
        std::printf("FAILED: %s\n    %s\n", describe(tried).c_str(), problem.c_str());
        if (++failures == (options.first ? 1 : 5)) break;
    }
    std::printf("%zu cases, %d failures\n", all.size(), failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace teamlora

int main(int count, char** arguments) {
    teamlora::Options options;
    for (int i = 1; i < count; ++i) {
        const std::string option = arguments[i];
        const char* value = i + 1 < count ? arguments[i + 1] : "";
        if (option == "--cases") options.cases = std::atoi(value);
        if (option == "--seed") options.seed = std::strtoull(value, nullptr, 10);
        if (option == "--small") options.small = true;
        if (option == "--only") options.kinds.push_back(value);
        if (option == "--first") options.first = true;
        if (option == "--no-poison") teamlora::poison = false;
    }
    return teamlora::run(options);
}
