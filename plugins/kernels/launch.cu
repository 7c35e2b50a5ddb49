#include <array>
#include <atomic>

#include "few_tokens.cuh"
#include "many_tokens.cuh"
#include "plan.h"

namespace teamlora {
namespace {

bool on_16_bytes(const void* pointer) noexcept { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether rows of `x` and `down` can be read 16 bytes at a time.
bool aligned_inputs(const MixedExpertShape& shape, const MixedExpertTensors& tensors) noexcept {
    return shape.in % pack_width(shape.dtype) == 0 && on_16_bytes(tensors.x) && on_16_bytes(tensors.down);
}

// Likewise `base`, `up` and `y`, from each sibling's first column on.
bool aligned_outputs(const MixedExpertShape& shape, const MixedExpertTensors& tensors) noexcept {
    bool aligned = on_16_bytes(tensors.base) && on_16_bytes(tensors.up) && on_16_bytes(tensors.y);
    for (int32_t g = 0; g < shape.num_siblings; ++g) aligned &= shape.out_splits[g] % pack_width(shape.dtype) == 0;
    return aligned;
}

Columns columns_of(const MixedExpertShape& shape) noexcept {
    Columns columns{shape.num_siblings, {}};
    for (int32_t g = 0; g < shape.num_siblings; ++g) columns.widths[g] = shape.out_splits[g];
    return columns;
}

// Whose weights the blocks of a call take (rows.cuh).
AdapterOfRow adapters_of(const MixedExpertShape& shape, const MixedExpertTensors& tensors, int tile,
                         int tiles) noexcept {
    return {tensors.adapter, shape.slots, tile, Divisor::of(static_cast<int>(shape.row_tokens)), Divisor::of(tiles)};
}

AdapterOfRow with_tiles(AdapterOfRow rows, int tiles) noexcept {
    rows.tiles = Divisor::of(tiles);
    return rows;
}

// Of several adapters, one token at a time is taken only where it is aligned, and its rows never one at a time.
template <typename T, int kTokens, typename... Rows>
auto few_down_of(int rows, bool aligned) noexcept {
    if constexpr (kTokens == 1 && kHasSlots<Rows...>) {
        return few_down<T, kTokens, 4, true, Rows...>;
    } else {
        if constexpr (kTokens == 1) {
            if (aligned && rows == 1) return few_down<T, kTokens, 1, true, Rows...>;
        }
        return aligned ? few_down<T, kTokens, 4, true, Rows...> : few_down<T, kTokens, 4, false, Rows...>;
    }
}

template <typename T, int kTokens, typename... Rows>
auto few_up_of(bool aligned) noexcept {
    if constexpr (kTokens == 1 && kHasSlots<Rows...>) {
        return few_up<T, kTokens, true, Rows...>;
    } else {
        return aligned ? few_up<T, kTokens, true, Rows...> : few_up<T, kTokens, false, Rows...>;
    }
}

template <typename T, int kTokens, typename... Rows>
cudaError_t launch_few(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                       const FewTokensPlan& plan, void* workspace, cudaStream_t stream, const Rows&... batch) noexcept {
    float* parts = static_cast<float*>(workspace);
    const int tokens = static_cast<int>(shape.tokens);
    const auto token_blocks = static_cast<unsigned>(plan.token_blocks);
    const bool aligned = aligned_inputs(shape, tensors);
    const int down_rows = aligned && !kHasSlots<Rows...> ? plan.down_rows : 4;
    const FewDownArguments down{tensors.x, tensors.down, parts, tokens, shape.in, shape.rows(), plan.slice_width};
    const dim3 down_grid(ceil_div(shape.rows(), down_rows), plan.slices, token_blocks);
    const size_t sums_bytes = sizeof(float) * plan.down_threads / 32 * down_rows * kTokens;
    const cudaError_t error =
        launch_kernel(few_down_of<T, kTokens, Rows...>(down_rows, aligned), down_grid, plan.down_threads, sums_bytes,
                      stream, Place::kFirst, tuning.overlaps, down, batch...);
    if (error != cudaSuccess) return error;

    const Columns columns = columns_of(shape);
    const FewUpArguments up{tensors.base,
                            tensors.mix,
                            tensors.up,
                            tensors.y,
                            parts,
                            tokens,
                            shape.num_experts,
                            shape.down_rank(),
                            plan.slices,
                            shape.rows(),
                            shape.out(),
                            Divisor::of(shape.expert_rank),
                            Divisor::of(shape.sibling_rows()),
                            shape.shared_down,
                            columns};
    const dim3 up_grid(columns.num_tiles(kUpLanes * Pack<T>::kWidth), token_blocks);
    return launch_kernel(few_up_of<T, kTokens, Rows...>(aligned_outputs(shape, tensors)), up_grid, kUpThreads,
                         plan.shared_bytes, stream, Place::kLast, tuning.overlaps, up, batch...);
}

template <typename T>
cudaError_t launch_few(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                       void* workspace, cudaStream_t stream) noexcept {
    const FewTokensPlan plan = plan_few_tokens(shape, tuning);
    switch (plan.token_tile) {
        case 1:
            return launch_few<T, 1>(shape, tuning, tensors, plan, workspace, stream);
        case 4:
            return launch_few<T, 4>(shape, tuning, tensors, plan, workspace, stream);
        default:
            return launch_few<T, 8>(shape, tuning, tensors, plan, workspace, stream);
    }
}

template <typename T>
cudaError_t launch_few_of_slots(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                                void* workspace, cudaStream_t stream) noexcept {
    const FewTokensPlan plan = plan_few_tokens(shape, tuning);
    const AdapterOfRow rows = adapters_of(shape, tensors, plan.token_tile, plan.token_blocks / plan.group_blocks);
    const bool aligned = aligned_inputs(shape, tensors) && aligned_outputs(shape, tensors);
    return plan.token_tile == 1 && aligned ? launch_few<T, 1>(shape, tuning, tensors, plan, workspace, stream, rows)
                                           : launch_few<T, 8>(shape, tuning, tensors, plan, workspace, stream, rows);
}

template <typename T, int kColumnTiles, typename... Rows>
cudaError_t launch_down(const ManyDownArguments& arguments, dim3 grid, bool overlaps, cudaStream_t stream,
                        const Rows&... batch) noexcept {
    using Shape = ManyDown<T, kColumnTiles>;
    return launch_kernel(many_down<T, kColumnTiles, Rows...>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                         Place::kFirst, overlaps, arguments, batch...);
}

template <typename T>
cudaError_t launch_down(const ManyDownArguments& arguments, int column_tiles, dim3 grid, bool overlaps,
                        cudaStream_t stream, const AdapterOfRow& batch) noexcept {
    return column_tiles == 3 ? launch_down<T, 3>(arguments, grid, overlaps, stream, batch)
                             : launch_down<T, 9>(arguments, grid, overlaps, stream, batch);
}

template <typename T>
cudaError_t launch_down(const ManyDownArguments& arguments, int column_tiles, dim3 grid, bool overlaps,
                        cudaStream_t stream) noexcept {
    switch (column_tiles) {
        case 1:
            return launch_down<T, 1>(arguments, grid, overlaps, stream);
        case 3:
            return launch_down<T, 3>(arguments, grid, overlaps, stream);
        case 5:
            return launch_down<T, 5>(arguments, grid, overlaps, stream);
        case 7:
            return launch_down<T, 7>(arguments, grid, overlaps, stream);
        default:
            return launch_down<T, 9>(arguments, grid, overlaps, stream);
    }
}

template <typename T, typename... Rows>
cudaError_t launch_many(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                        const ManyTokensPlan& plan, void* workspace, cudaStream_t stream,
                        const Rows&... batch) noexcept {
    auto* parts = static_cast<float*>(workspace);
    void* values = static_cast<char*>(workspace) + plan.values_offset;
    const int tokens = static_cast<int>(shape.tokens);
    const ManyDownArguments down{tensors.x,       tensors.down,     parts,
                                 tokens,          shape.in,         shape.rows(),
                                 plan.row_stride, plan.split_width, aligned_inputs(shape, tensors)};
    const dim3 down_grid(plan.token_blocks, plan.column_blocks, plan.splits);
    cudaError_t error = launch_down<T>(down, plan.column_tiles, down_grid, tuning.overlaps, stream, batch...);
    if (error != cudaSuccess) return error;

    const ManyRouteArguments middle{{parts, plan.splits, tokens, plan.row_stride},
                                    tensors.mix,
                                    values,
                                    shape.num_experts,
                                    shape.down_rank(),
                                    plan.route_tokens,
                                    Divisor::of(shape.expert_rank),
                                    Divisor::of(shape.sibling_rows()),
                                    Divisor::of(plan.value_stride),
                                    shape.shared_down};
    const dim3 route_grid(plan.route_blocks, shape.num_siblings);
    error = launch_kernel(many_route<T, Rows...>, route_grid, kRouteThreads, plan.route_shared_bytes, stream,
                          Place::kNext, tuning.overlaps, middle, with_tiles(batch, plan.route_row_blocks)...);
    if (error != cudaSuccess) return error;

    const Columns columns = columns_of(shape);
    const ManyUpArguments up{tensors.base,    tensors.up,        tensors.y,   values, tokens,
                             shape.up_rank(), plan.value_stride, shape.out(), columns};
    const dim3 up_grid(plan.token_blocks, columns.num_tiles(ManyUp<T>::kColumns));
    const auto up_kernel = aligned_outputs(shape, tensors) ? many_up<T, true, Rows...> : many_up<T, false, Rows...>;
    return launch_kernel(up_kernel, up_grid, ManyUp<T>::kThreads, ManyUp<T>::kSharedBytes, stream, Place::kLast,
                         tuning.overlaps, up, batch...);
}

template <typename T>
cudaError_t launch_many(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                        void* workspace, cudaStream_t stream) noexcept {
    const ManyTokensPlan plan = plan_many_tokens(shape, tuning);
    return launch_many<T>(shape, tuning, tensors, plan, workspace, stream);
}

template <typename T>
cudaError_t launch_many_of_slots(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                                 void* workspace, cudaStream_t stream) noexcept {
    const ManyTokensPlan plan = plan_many_tokens(shape, tuning);
    return launch_many<T>(shape, tuning, tensors, plan, workspace, stream,
                          adapters_of(shape, tensors, 0, plan.row_blocks));
}

template <typename T>
cudaError_t launch_typed(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                         void* workspace, cudaStream_t stream) noexcept {
    if (shape.slots > 0) {
        return takes_few(shape, tuning) ? launch_few_of_slots<T>(shape, tuning, tensors, workspace, stream)
                                        : launch_many_of_slots<T>(shape, tuning, tensors, workspace, stream);
    }
    return takes_few(shape, tuning) ? launch_few<T>(shape, tuning, tensors, workspace, stream)
                                    : launch_many<T>(shape, tuning, tensors, workspace, stream);
}

// A device's answer in one word that threads may write at once: they write the same. 0: not yet asked.
constexpr int kMostDevices = 64;
constexpr uint32_t kAsked = 1U << 31, kOverlaps = 1U << 30;
std::array<std::atomic<uint32_t>, kMostDevices> answers{};

}  // namespace

cudaError_t tuning_of_device(Tuning& tuning) noexcept {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    uint32_t answer = device < kMostDevices ? answers[device].load(std::memory_order_relaxed) : 0;
    if (answer == 0) {
        Device asked{};
        error = ask_device(device, few_up<__half, 1, true>, asked);
        if (error != cudaSuccess) return error;
        answer = kAsked | (asked.overlaps ? kOverlaps : 0) | static_cast<uint32_t>(asked.multiprocessors);
        if (device < kMostDevices) answers[device].store(answer, std::memory_order_relaxed);
    }
    tuning = Tuning{};
    tuning.multiprocessors = static_cast<int32_t>(answer & ~(kAsked | kOverlaps));
    tuning.overlaps = (answer & kOverlaps) != 0;
    return cudaSuccess;
}

cudaError_t launch(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                   void* workspace, cudaStream_t stream) noexcept {
    if (unsupported(shape) != nullptr) return cudaErrorInvalidValue;
    if (shape.tokens == 0) return cudaSuccess;
    switch (shape.dtype) {
        case DataType::kFloat32:
            return launch_typed<float>(shape, tuning, tensors, workspace, stream);
        case DataType::kFloat16:
            return launch_typed<__half>(shape, tuning, tensors, workspace, stream);
        case DataType::kBFloat16:
            return launch_typed<__nv_bfloat16>(shape, tuning, tensors, workspace, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace teamlora
