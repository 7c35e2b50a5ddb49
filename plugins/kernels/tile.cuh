// 16x16 tiles of a matrix product, one warp each, accumulated in float32: tensor cores for half and bfloat16, FMA for
// float (TF32 would round what a user of float32 wants kept).
#pragma once

#include "elements.cuh"

namespace teamlora {

inline constexpr int kTile = 16;

enum class Order { kRowMajor, kColumnMajor };

// `kDepth` is how much of the inner dimension one `multiply` takes. Pointers are into shared memory and 32-byte
// aligned; leading dimensions are multiples of 16 bytes.
template <typename T>
struct Tile {
    static constexpr int kDepth = 16;
    using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kDepth, float>;
    using Left = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kTile, kTile, kDepth, T, nvcuda::wmma::row_major>;
    template <Order kOrder>
    using Right = nvcuda::wmma::fragment<
        nvcuda::wmma::matrix_b, kTile, kTile, kDepth, T,
        std::conditional_t<kOrder == Order::kRowMajor, nvcuda::wmma::row_major, nvcuda::wmma::col_major>>;

    __device__ static void clear(Accumulator& sum) { nvcuda::wmma::fill_fragment(sum, 0.0F); }

    __device__ static Left load_left(const T* left, int stride) {
        Left fragment;
        nvcuda::wmma::load_matrix_sync(fragment, left, stride);
        return fragment;
    }

    template <Order kOrder>
    __device__ static void multiply(Accumulator& sum, const Left& left, const T* right, int stride) {
        Right<kOrder> fragment;
        nvcuda::wmma::load_matrix_sync(fragment, right, stride);
        nvcuda::wmma::mma_sync(sum, left, fragment, sum);
    }

    __device__ static void store(float* target, const Accumulator& sum, int stride) {
        nvcuda::wmma::store_matrix_sync(target, sum, stride, nvcuda::wmma::mem_row_major);
    }

    __device__ static void add(Accumulator& sum, const float* source, int stride) {
        Accumulator other;
        nvcuda::wmma::load_matrix_sync(other, source, stride, nvcuda::wmma::mem_row_major);
#pragma unroll
        for (int i = 0; i < sum.num_elements; ++i) sum.x[i] += other.x[i];
    }
};

// A lane holds four rows of two columns.
template <>
struct Tile<float> {
    static constexpr int kDepth = 8;
    struct Accumulator {
        float values[4][2];
    };
    struct Left {
        const float* rows;
        int stride;
    };

    __device__ static int row() { return threadIdx.x % 32 / 8 * 4; }
    __device__ static int column() { return threadIdx.x % 8 * 2; }

    __device__ static void clear(Accumulator& sum) { sum = {}; }

    __device__ static Left load_left(const float* left, int stride) { return {left + row() * stride, stride}; }

    template <Order kOrder>
    __device__ static void multiply(Accumulator& sum, const Left& left, const float* right, int stride) {
        const int along = kOrder == Order::kRowMajor ? stride : 1, across = kOrder == Order::kRowMajor ? 1 : stride;
#pragma unroll
        for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float value = right[depth * along + (column() + j) * across];
#pragma unroll
                for (int i = 0; i < 4; ++i) sum.values[i][j] += left.rows[i * left.stride + depth] * value;
            }
        }
    }

    __device__ static void store(float* target, const Accumulator& sum, int stride) {
#pragma unroll
        for (int i = 0; i < 8; ++i) target[(row() + i / 2) * stride + column() + i % 2] = sum.values[i / 2][i % 2];
    }

    __device__ static void add(Accumulator& sum, const float* source, int stride) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.values[i / 2][i % 2] += source[(row() + i / 2) * stride + column() + i % 2];
    }
};

}  // namespace teamlora
