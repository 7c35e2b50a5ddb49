// The router-mixed expert projection on a CPU: shapes, packed weights, one call. Standard C++ and nothing else.
//
//     z = x downT                              [tokens, G (a + k)]     summed in float32, rounded to T
//     w = softmax(logits) mix, normalised      [tokens, G, k]          in float32
//     v = w_e u_e                              [tokens, G k c]         in float32, rounded to T
//     y = base + v up                          [tokens, O]             summed in float32, rounded to T
//
// The op's definition is teamlora_export/graph/op.py. Where T is float32, downT and up may have 16 bits. Weights are
// packed once, into panels of as many columns as a tile of the instruction set's registers has; a panel of `down` holds
// some of its rows, one of `up` some columns of one sibling.
//
// Few tokens read each weight once, and that is what takes the time: the depth of the first product, then the columns
// of the second, are shared out to the threads. Many tokens are cut into blocks that go through all four steps while
// their z and v are in the cache, a block a task.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace teamlora::cpu {

enum class DataType : int32_t { kFloat32, kFloat16, kBFloat16 };

constexpr size_t element_size(DataType type) noexcept { return type == DataType::kFloat32 ? 4 : 2; }

// `expert_rank` is c; a = k c, or a = c where every expert reads all of u.
struct Shape {
    DataType dtype = DataType::kFloat32;
    int64_t in = 0;
    int64_t num_experts = 0;
    int64_t expert_rank = 0;
    bool shared_down = false;
    std::vector<int64_t> out_splits;
    // Of `down` and `up`: dtype, or one of 16 bits beside float32.
    DataType weights = dtype;

    int64_t siblings() const noexcept { return static_cast<int64_t>(out_splits.size()); }
    int64_t up_rank() const noexcept { return num_experts * expert_rank; }
    int64_t down_rank() const noexcept { return shared_down ? expert_rank : up_rank(); }
    int64_t sibling_rows() const noexcept { return down_rank() + num_experts; }
    int64_t rows() const noexcept { return siblings() * sibling_rows(); }
    int64_t out() const noexcept {
        int64_t sum = 0;
        for (const int64_t width : out_splits) sum += width;
        return sum;
    }
};

// Some columns of a product's right side, dense: [depth, width], from element `offset` on.
struct Panel {
    int64_t offset;
    int64_t column;
    int64_t width;
    int64_t sibling;
};

struct Code;

// Throws std::bad_alloc. Safe in any number of threads.
void* take_pages(size_t bytes);
void give_pages(void* memory) noexcept;

// Memory that begins at a cache line, in pages of two megabytes where the system has them, which many share: a
// processor that reads weights of a few kilobytes here and there would otherwise look up a page for each.
template <class T>
struct LargePages {
    using value_type = T;
    LargePages() = default;
    template <class U>
    LargePages(const LargePages<U>&) noexcept {}
    T* allocate(size_t count) { return static_cast<T*>(take_pages(count * sizeof(T))); }
    void deallocate(T* memory, size_t) noexcept { give_pages(memory); }
};
template <class T, class U>
bool operator==(const LargePages<T>&, const LargePages<U>&) noexcept {
    return true;
}
template <class T, class U>
bool operator!=(const LargePages<T>&, const LargePages<U>&) noexcept {
    return false;
}
using Bytes = std::vector<unsigned char, LargePages<unsigned char>>;

// Memory that a call works in. It grows to the largest call's need and is used again.
class Workspace {
public:
    // At least `count` floats, their content undefined, aligned to a cache line.
    float* floats(size_t count);

private:
    struct Free {
        void operator()(void* memory) const noexcept;
    };
    std::unique_ptr<float, Free> memory_;
    size_t count_ = 0;
};

// How tasks 0 .. count - 1 are run, possibly at once; returns when all are done.
struct Parallel {
    void (*run)(void* pool, void (*task)(void* data, size_t index), size_t count, void* data);
    void* pool;
};

// `y` may be `base` itself; nothing else may overlap.
struct Tensors {
    const void* x;     // T [tokens, in]
    const void* base;  // T [tokens, O]
    void* y;           // T [tokens, O]
};

// One projection with its weights, ready to run; any number of threads may call it at once, each with a workspace.
class Projection {
public:
    // Packs `down` [G (a + k), in] and `up` [k c, O], both of `shape.weights`, and `mix` float32 [G, k, k], which may
    // go afterwards.
    Projection(Shape shape, const Code& code, const void* down, const float* mix, const void* up);

    const Shape& shape() const noexcept { return shape_; }

    // `threads`: into how many tasks a call is cut at most, where it is worth it.
    void run(const Tensors& tensors, int64_t tokens, Workspace& workspace, const Parallel& parallel,
             int64_t threads) const;

private:
    struct Few;
    struct Many;

    Shape shape_;
    const Code& code_;
    // `down`, and `up` behind it, in the order they are read in.
    Bytes weights_;
    int64_t down_bytes_;
    std::vector<float> mix_;
    std::vector<Panel> down_panels_, up_panels_;
};

}  // namespace teamlora::cpu
