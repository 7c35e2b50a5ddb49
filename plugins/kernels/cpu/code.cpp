// The arithmetic, compiled once for each instruction set: TEAMLORA_CODE names it, the compiler's flags make it.
//
// Both products are sums over one row of a panel times one element of the left side, kept in registers as a tile of
// tokens x columns. A panel narrower than its vectors is read past its row's end, into the next row: those columns'
// sums are never stored (and packed weights end in room for one vector more).
#include "code.h"
#include "vector.h"

#define TEAMLORA_UNROLL _Pragma("GCC unroll 12")

namespace teamlora::cpu::TEAMLORA_CODE {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A panel of few tokens comes from memory: so many bytes ahead are asked for, which hardware does not do beyond a page.
constexpr int64_t kAhead = 4096, kCacheLine = 64;
constexpr int kFewRows = kTileRows < 9 ? kTileRows : 9;

// How many sums each element of a small tile has: one would wait for itself at every step.
constexpr int sums_of(int rows, int vectors) {
    return rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : rows * vectors >= 2 ? 4 : 8;
}

template <class T>
inline void ask_for(const T* from, int64_t count) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(from) + kAhead, bytes = static_cast<uintptr_t>(count) * sizeof(T);
    for (uintptr_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(reinterpret_cast<const void*>(at + i));
}

// left [kRows, depth] with rows `stride` apart, times panel [depth, width]. All loops over a tile are unrolled, or its
// sums would live in memory.
template <int kRows, int kVectors, class T>
inline void multiply(const float* left, int64_t stride, const T* panel, int64_t width, int64_t depth,
                     Vector (&sums)[kRows][kVectors]) {
    constexpr int kSums = sums_of(kRows, kVectors);
    Vector parts[kSums][kRows][kVectors];
    TEAMLORA_UNROLL
    for (int s = 0; s < kSums; ++s) {
        TEAMLORA_UNROLL
        for (int m = 0; m < kRows; ++m) {
            TEAMLORA_UNROLL
            for (int v = 0; v < kVectors; ++v) parts[s][m][v] = Vector{};
        }
    }
    const auto add = [&](int64_t d, Vector(&to)[kRows][kVectors]) {
        Vector row[kVectors];
        TEAMLORA_UNROLL
        for (int v = 0; v < kVectors; ++v) row[v] = load(panel + d * width + v * kLanes);
        TEAMLORA_UNROLL
        for (int m = 0; m < kRows; ++m) {
            const float element = left[m * stride + d];
            TEAMLORA_UNROLL
            for (int v = 0; v < kVectors; ++v) to[m][v] += element * row[v];
        }
    };
    int64_t d = 0;
    for (; d + kSums <= depth; d += kSums) {
        if constexpr (kRows < kFewRows) ask_for(panel + d * width, kSums * width);
        TEAMLORA_UNROLL
        for (int s = 0; s < kSums; ++s) add(d + s, parts[s]);
    }
    for (; d < depth; ++d) add(d, parts[0]);
    TEAMLORA_UNROLL
    for (int m = 0; m < kRows; ++m) {
        TEAMLORA_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            sums[m][v] = parts[0][m][v];
            TEAMLORA_UNROLL
            for (int s = 1; s < kSums; ++s) sums[m][v] += parts[s][m][v];
        }
    }
}

// Calls work.template tile<rows, vectors>() with what is known when the program runs made known to the compiler.
template <int kRows, int kVectors, class Work>
inline void with_vectors(const Work& work, int64_t vectors) {
    if (vectors == kVectors) {
        work.template tile<kRows, kVectors>();
    } else if constexpr (kVectors > 1) {
        with_vectors<kRows, kVectors - 1>(work, vectors);
    }
}
template <int kRows = kTileRows, class Work>
inline void with_size(const Work& work, int64_t rows, int64_t width) {
    if (rows == kRows) {
        with_vectors<kRows, kTileVectors>(work, (width + kLanes - 1) / kLanes);
    } else if constexpr (kRows > 1) {
        with_size<kRows - 1>(work, rows, width);
    }
}

template <class S>
struct DownTile {
    const float* left;
    int64_t stride;
    const S* panel;
    int64_t width, depth;
    float* z;
    int64_t z_stride;
    bool adds;

    template <int kRows, int kVectors>
    void tile() const {
        Vector sums[kRows][kVectors];
        multiply<kRows, kVectors>(left, stride, panel, width, depth, sums);
        TEAMLORA_UNROLL
        for (int m = 0; m < kRows; ++m) {
            TEAMLORA_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                float* to = z + m * z_stride + v * kLanes;
                store(to, adds ? load(to) + sums[m][v] : sums[m][v]);
            }
        }
    }
};

// y = base + sums for `count` columns.
template <class T>
__attribute__((noinline)) void add_part(const T* base, const float* sums, int64_t count, T* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t part = least(kLanes, count - i);
        store_part(y + i, load_part(base + i, part) + load(sums + i), part);
    }
}

template <class T, class S>
struct UpTile {
    const float* left;
    int64_t stride;
    const S* panel;
    int64_t width, depth;
    const T* base;
    T* y;
    int64_t out;

    template <int kRows, int kVectors>
    void tile() const {
        // The next panel's part of `base` is on its way while this one's sums are made.
        for (int m = 0; m < kRows; ++m) {
            for (int v = 0; v < kVectors; ++v) __builtin_prefetch(base + m * out + (kVectors + v) * kLanes, 1);
        }
        Vector sums[kRows][kVectors];
        multiply<kRows, kVectors>(left, stride, panel, width, depth, sums);
        if (width == kVectors * kLanes) {
            TEAMLORA_UNROLL
            for (int m = 0; m < kRows; ++m) {
                TEAMLORA_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = m * out + v * kLanes;
                    store(y + at, load(base + at) + sums[m][v]);
                }
            }
            return;
        }
        float made[kRows][kVectors * kLanes];
        TEAMLORA_UNROLL
        for (int m = 0; m < kRows; ++m) {
            TEAMLORA_UNROLL
            for (int v = 0; v < kVectors; ++v) store(&made[m][v * kLanes], sums[m][v]);
        }
        for (int m = 0; m < kRows; ++m) add_part(base + m * out, made[m], width, y + m * out);
    }
};

template <class T>
void widen(const T* from, int64_t stride, int64_t tokens, int64_t columns, float* to) {
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t i = 0;
        for (; i + kLanes <= columns; i += kLanes) store(to + t * columns + i, load(from + t * stride + i));
        if (i < columns) store_part(to + t * columns + i, load_part(from + t * stride + i, columns - i), columns - i);
    }
}

template <class T, class S>
void down(const Job& job, int64_t first, int64_t tokens, int64_t from, int64_t to, float* wide, float* z) {
    const S* weights = static_cast<const S*>(job.down);
    // Few tokens go through all of a panel at once, as it lies in memory, where x is read as it is.
    const int64_t block = sizeof(T) == sizeof(float) && tokens < kFewRows ? to - from : kDepthBlock;
    for (int64_t begin = from; begin < to; begin += block) {
        const int64_t depth = least(block, to - begin);
        const T* x = static_cast<const T*>(job.x) + first * job.in + begin;
        const float* left;
        int64_t stride;
        if constexpr (sizeof(T) == sizeof(float)) {
            left = x, stride = job.in;
        } else {
            widen(x, job.in, tokens, depth, wide);
            left = wide, stride = depth;
        }
        for (int64_t p = 0; p < job.num_down_panels; ++p) {
            const Panel& panel = job.down_panels[p];
            const S* part = weights + panel.offset + begin * panel.width;
            for (int64_t t = 0; t < tokens; t += kTileRows) {
                const DownTile<S> work{left + t * stride, stride,      part,
                                       panel.width,       depth,       z + t * job.z_stride + panel.column,
                                       job.z_stride,      begin > from};
                with_size(work, least(kTileRows, tokens - t), panel.width);
            }
        }
    }
}

// Logits less the largest of those that count. The others, whatever they are, are as good as nothing.
inline void distances(int64_t k, const float* logits, const float* present, float* e) {
    int64_t first = 0;
    while (first + 1 < k && present[first] == 0) ++first;
    float most = logits[first];
    for (int64_t i = first; i < k; ++i) most = present[i] != 0 && logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < k; ++i) e[i] = present[i] != 0 ? logits[i] - most : -100;
}

// A sibling's mixing weights: e = exp(logits - max) of all tokens at once, then one token's w at a time.
inline void exponentials(const Job& job, int64_t tokens, const float* logits, const float* present, float* e) {
    const int64_t k = job.num_experts;
    for (int64_t t = 0; t < tokens; ++t, logits += job.z_stride) {
        if (present != nullptr) {
            distances(k, logits, present, e + t * k);
            continue;
        }
        float most = logits[0];
        for (int64_t i = 1; i < k; ++i) most = logits[i] > most ? logits[i] : most;
        for (int64_t i = 0; i < k; ++i) e[t * k + i] = logits[i] - most;
    }
    for (int64_t i = 0; i < tokens * k; i += kLanes) store(e + i, exp_of_negative(load(e + i)));
}

inline bool none_of(int64_t k, const float* present) {
    for (int64_t i = 0; i < k; ++i) {
        if (present[i] != 0) return false;
    }
    return true;
}

inline void normalised(int64_t k, const float* e, const float* mix, float* w) {
    for (int64_t j = 0; j < k; ++j) w[j] = e[0] * mix[j];
    for (int64_t i = 1; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) w[j] += e[i] * mix[i * k + j];
    }
    float sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += w[j];
    for (int64_t j = 0; j < k; ++j) w[j] /= sum;
}

template <class T>
void route(const Job& job, int64_t tokens, float* z, float* weights, float* v) {
    const int64_t k = job.num_experts, c = job.expert_rank, rows = job.down_rank + k;
    if (sizeof(T) < sizeof(float)) {
        for (int64_t i = 0; i < tokens * job.z_stride; i += kLanes) store(z + i, rounded<T>(load(z + i)));
    }
    float* w = weights;
    float* e = weights + k;
    for (int64_t g = 0; g < job.siblings; ++g) {
        const float* mix = job.mix + g * k * k;
        const float* present = job.present == nullptr ? nullptr : job.present + g * k;
        if (present != nullptr && none_of(k, present)) {
            for (int64_t t = 0; t < tokens; ++t) {
                for (int64_t i = 0; i < job.up_rank; ++i) v[t * job.v_stride + g * job.up_rank + i] = 0;
            }
            continue;
        }
        exponentials(job, tokens, z + g * rows + job.down_rank, present, e);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* u = z + t * job.z_stride + g * rows;
            float* to = v + t * job.v_stride + g * job.up_rank;
            k == 4 ? normalised(4, e + t * 4, mix, w) : normalised(k, e + t * k, mix, w);
            for (int64_t i = 0; i < k; ++i, u += job.shared_down ? 0 : c) {
                for (int64_t j = 0; j < c; ++j) *to++ = w[i] * u[j];
            }
        }
    }
    if (sizeof(T) < sizeof(float)) {
        for (int64_t i = 0; i < tokens * job.v_stride; i += kLanes) store(v + i, rounded<T>(load(v + i)));
    }
}

template <class T, class S>
void up(const Job& job, int64_t first, int64_t tokens, int64_t from, int64_t to, const float* v) {
    for (int64_t t = 0; t < tokens; t += kTileRows) {
        for (int64_t p = from; p < to; ++p) {
            const Panel& panel = job.up_panels[p];
            const int64_t at = (first + t) * job.out + panel.column;
            const UpTile<T, S> work{v + t * job.v_stride + panel.sibling * job.up_rank,
                                    job.v_stride,
                                    static_cast<const S*>(job.up) + panel.offset,
                                    panel.width,
                                    job.up_rank,
                                    static_cast<const T*>(job.base) + at,
                                    static_cast<T*>(job.y) + at,
                                    job.out};
            with_size(work, least(kTileRows, tokens - t), panel.width);
        }
    }
}

// S is the type of `down` and `up`.
template <class T, class S = T>
constexpr Steps kSteps = {down<T, S>, route<T>, up<T, S>};

#define TEAMLORA_TEXT_OF(name) #name
#define TEAMLORA_TEXT(name) TEAMLORA_TEXT_OF(name)

}  // namespace

extern const SlotSteps kSlotSteps[3];
extern const SlotSteps kNarrowSlotSteps[3];
extern const Code kCode;
const Code kCode = {TEAMLORA_TEXT(TEAMLORA_CODE),
                    kLanes,
                    kTileRows,
                    kTileVectors * kLanes,
                    {kSteps<float>, kSteps<Float16>, kSteps<BFloat16>},
                    {kSteps<float>, kSteps<float, Float16>, kSteps<float, BFloat16>},

                    kSlotSteps,
                    kNarrowSlotSteps};

}  // namespace teamlora::cpu::TEAMLORA_CODE
