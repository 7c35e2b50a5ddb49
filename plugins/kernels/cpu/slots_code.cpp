// The arithmetic on weights as they lie, compiled once for each instruction set, as code.cpp is.
//
// A row of `down` and a token are both dense, so z is made of products of vectors along `in`; a row of `up` is dense
// along its columns, so y is made as in code.cpp, of panels whose rows lie apart. Tiles are small, and every sum is
// made in one order whatever the tile: a token gives the same beside others.
#include "code.h"
#include "vector.h"

#define TEAMLORA_UNROLL _Pragma("GCC unroll 12")

namespace teamlora::cpu::TEAMLORA_CODE {
namespace {

// Registers hold a tile's sums, a vector of each token, and one of a row.
constexpr int kDotTokens = kLanes == 16 ? 4 : 3, kDotRows = kLanes == 16 ? 6 : 4;
// Sums of a tile of `up` that registers hold; few tokens take more columns at a time, which lie together.
constexpr int kUpTokens = kTileRows, kUpSums = kTileRows * kTileVectors;
// Of so few tokens, in place of tiles: columns whose sums are held at a time, and rows that are added to them together.
constexpr int64_t kStreamTokens = 2, kStreamColumns = 1024;
constexpr int kStreamRows = 4;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float sum_of(Vector value) {
    using Four = float __attribute__((vector_size(16)));
    Four part[kLanes / 4];
    __builtin_memcpy(part, &value, sizeof(value));
    TEAMLORA_UNROLL
    for (int half = kLanes / 8; half > 0; half /= 2) {
        TEAMLORA_UNROLL
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

// z of some tokens and some rows of `down`, whose first is `row`; S is the type of `down` and `up`.
template <class S>
struct DotTile {
    const float* const* x;
    const S* row;
    int64_t in;
    float* z;
    int64_t z_stride;

    template <int kTokens, int kRows>
    void tile() const {
        Vector sums[kTokens][kRows];
        TEAMLORA_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            TEAMLORA_UNROLL
            for (int r = 0; r < kRows; ++r) sums[t][r] = Vector{};
        }
        int64_t i = 0;
        for (; i + kLanes <= in; i += kLanes) {
            Vector values[kTokens];
            TEAMLORA_UNROLL
            for (int t = 0; t < kTokens; ++t) values[t] = load(x[t] + i);
            TEAMLORA_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const Vector weights = load(row + r * in + i);
                TEAMLORA_UNROLL
                for (int t = 0; t < kTokens; ++t) sums[t][r] += values[t] * weights;
            }
        }
        if (i < in) {
            for (int r = 0; r < kRows; ++r) {
                const Vector weights = load_part(row + r * in + i, in - i);
                for (int t = 0; t < kTokens; ++t) sums[t][r] += load_part(x[t] + i, in - i) * weights;
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            for (int r = 0; r < kRows; ++r) z[t * z_stride + r] = sum_of(sums[t][r]);
        }
    }
};

// Calls work.template tile<first, second>() with what is known when the program runs made known to the compiler.
template <int kFirst, int kSecond, class Work>
inline void with_second(const Work& work, int64_t second) {
    if (second == kSecond) {
        work.template tile<kFirst, kSecond>();
    } else if constexpr (kSecond > 1) {
        with_second<kFirst, kSecond - 1>(work, second);
    }
}
template <int kFirst, int kSecond, class Work>
inline void with_tile(const Work& work, int64_t first, int64_t second) {
    if (first == kFirst) {
        with_second<kFirst, kSecond>(work, second);
    } else if constexpr (kFirst > 1) {
        with_tile<kFirst - 1, kSecond>(work, first, second);
    }
}

template <class T>
void widen(const void* from, int64_t count, float* to) {
    const T* values = static_cast<const T*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(values + i));
    for (; i < count; ++i) {
        float part[kLanes];
        store(part, load_part(values + i, 1));
        to[i] = part[0];
    }
}

template <class S>
void down(const Job& job, const float* const* x, int64_t tokens, int64_t from, int64_t to, float* z) {
    const S* weights = static_cast<const S*>(job.down);
    for (int64_t row = from; row < to; row += kDotRows) {
        for (int64_t t = 0; t < tokens; t += kDotTokens) {
            const DotTile<S> work{x + t, weights + row * job.in, job.in, z + t * job.z_stride + row, job.z_stride};
            with_tile<kDotTokens, kDotRows>(work, least(kDotTokens, tokens - t), least(kDotRows, to - row));
        }
    }
}

// y = base + v up for some tokens and some vectors of columns; the last vector has `tail` columns.
template <class T, class S>
struct UpTile {
    const float* v;
    int64_t v_stride, depth;
    const S* weights;
    int64_t stride;
    const void* const* base;
    void* const* y;
    int64_t column, tail;

    template <int kTokens, int kVectors>
    void tile() const {
        if constexpr (kTokens * kVectors <= kUpSums) {
            tail == kLanes ? multiply<kTokens, kVectors, false>() : multiply<kTokens, kVectors, true>();
        }
    }

    template <int kTokens, int kVectors, bool kPart>
    void multiply() const {
        Vector sums[kTokens][kVectors];
        TEAMLORA_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            TEAMLORA_UNROLL
            for (int i = 0; i < kVectors; ++i) sums[t][i] = Vector{};
        }
        const S* row = weights;
        for (int64_t d = 0; d < depth; ++d, row += stride) {
            Vector values[kVectors];
            TEAMLORA_UNROLL
            for (int i = 0; i < kVectors; ++i) {
                const bool part = kPart && i == kVectors - 1;
                values[i] = part ? load_part(row + i * kLanes, tail) : load(row + i * kLanes);
                // The processor does not foresee steps of a row's length.
                __builtin_prefetch(row + (kVectors + i) * kLanes);
            }
            TEAMLORA_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                const float element = v[t * v_stride + d];
                TEAMLORA_UNROLL
                for (int i = 0; i < kVectors; ++i) sums[t][i] += element * values[i];
            }
        }
        TEAMLORA_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            const T* added = static_cast<const T*>(base[t]) + column;
            T* to = static_cast<T*>(y[t]) + column;
            TEAMLORA_UNROLL
            for (int i = 0; i < kVectors; ++i) {
                if (kPart && i == kVectors - 1) {
                    store_part(to + i * kLanes, load_part(added + i * kLanes, tail) + sums[t][i], tail);
                } else {
                    store(to + i * kLanes, load(added + i * kLanes) + sums[t][i]);
                }
            }
        }
    }
};

// The same for few tokens and up to kStreamColumns columns, row by row: weights that come from memory come as it gives
// them out fastest, and the sums wait in the cache.
template <class T, class S>
struct Stream {
    const float* v;
    int64_t v_stride, depth;
    const S* weights;
    int64_t stride;
    const void* const* base;
    void* const* y;
    int64_t column, columns;

    template <int kTokens, int kRows>
    void tile() const {
        float sums[kTokens][kStreamColumns];
        for (int t = 0; t < kTokens; ++t) {
            for (int64_t i = 0; i < columns; i += kLanes) store(sums[t] + i, Vector{});
        }
        int64_t d = 0;
        for (; d + kRows <= depth; d += kRows) add<kTokens, kRows>(d, sums);
        for (; d < depth; ++d) add<kTokens, 1>(d, sums);
        for (int t = 0; t < kTokens; ++t) {
            const T* added = static_cast<const T*>(base[t]) + column;
            T* to = static_cast<T*>(y[t]) + column;
            int64_t i = 0;
            for (; i + kLanes <= columns; i += kLanes) store(to + i, load(added + i) + load(sums[t] + i));
            if (i < columns) store_part(to + i, load_part(added + i, columns - i) + load(sums[t] + i), columns - i);
        }
    }

    template <int kTokens, int kRows>
    void add(int64_t d, float (&sums)[kTokens][kStreamColumns]) const {
        const S* row = weights + d * stride;
        int64_t i = 0;
        for (; i + kLanes <= columns; i += kLanes) {
            Vector values[kRows];
            TEAMLORA_UNROLL
            for (int r = 0; r < kRows; ++r) values[r] = load(row + r * stride + i);
            add_vector<kTokens, kRows>(d, i, values, sums);
        }
        if (i < columns) {
            Vector values[kRows];
            for (int r = 0; r < kRows; ++r) values[r] = load_part(row + r * stride + i, columns - i);
            add_vector<kTokens, kRows>(d, i, values, sums);
        }
    }

    template <int kTokens, int kRows>
    void add_vector(int64_t d, int64_t i, const Vector (&values)[kRows], float (&sums)[kTokens][kStreamColumns]) const {
        TEAMLORA_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            Vector sum = load(sums[t] + i);
            TEAMLORA_UNROLL
            for (int r = 0; r < kRows; ++r) sum += v[t * v_stride + d + r] * values[r];
            store(sums[t] + i, sum);
        }
    }
};

template <class T, class S>
void stream_up(const Job& job, const void* const* base, void* const* y, int64_t tokens, int64_t from, int64_t to,
               const float* v) {
    for (int64_t column = from; column < to; column += kStreamColumns) {
        const Stream<T, S> work{v,
                                job.v_stride,
                                job.up_rank,
                                static_cast<const S*>(job.up) + column,
                                job.out,
                                base,
                                y,
                                column,
                                least(kStreamColumns, to - column)};
        tokens == 1 ? work.template tile<1, kStreamRows>() : work.template tile<2, kStreamRows>();
    }
}

template <class T, class S>
void up(const Job& job, const void* const* base, void* const* y, int64_t tokens, int64_t sibling, int64_t from,
        int64_t to, const float* v) {
    const S* weights = static_cast<const S*>(job.up);
    for (int64_t t = 0; t < tokens;) {
        const int64_t count = least(kUpTokens, tokens - t);
        const float* own = v + t * job.v_stride + sibling * job.up_rank;
        if (count <= kStreamTokens) {
            stream_up<T, S>(job, base + t, y + t, count, from, to, own);
            return;
        }
        const int64_t most = least(kUpSums / count, 2 * kTileVectors);
        for (int64_t column = from; column < to;) {
            const int64_t vectors = least(most, (to - column + kLanes - 1) / kLanes);
            const int64_t columns = least(vectors * kLanes, to - column);
            const UpTile<T, S> work{own,
                                    job.v_stride,
                                    job.up_rank,
                                    weights + column,
                                    job.out,
                                    base + t,
                                    y + t,
                                    column,
                                    columns - (vectors - 1) * kLanes};
            with_tile<kUpTokens, 2 * kTileVectors>(work, count, vectors);
            column += columns;
        }
        t += count;
    }
}

template <class T, class S = T>
constexpr SlotSteps kStepsOf = {widen<T>, down<S>, up<T, S>};

}  // namespace

extern const SlotSteps kSlotSteps[3];
const SlotSteps kSlotSteps[3] = {kStepsOf<float>, kStepsOf<Float16>, kStepsOf<BFloat16>};
extern const SlotSteps kNarrowSlotSteps[3];
const SlotSteps kNarrowSlotSteps[3] = {kStepsOf<float>, kStepsOf<float, Float16>, kStepsOf<float, BFloat16>};

}  // namespace teamlora::cpu::TEAMLORA_CODE
