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

template <typename T, int kTokens>
cudaError_t launch_few(const MixedExpertShape& shape, const MixedExpertTensors& tensors, const FewTokensPlan& plan,
                       void* workspace, cudaStream_t stream) noexcept {
    float* partials = static_cast<float*>(workspace);
    const int tokens = static_cast<int>(shape.tokens);
    const auto token_tiles = static_cast<unsigned>(ceil_div(tokens, kTokens));
    const FewDownArguments down{tensors.x, tensors.down, partials, tokens, shape.in, shape.rows(), plan.slice_width};
    const dim3 down_grid(ceil_div(shape.rows(), kDownRows), plan.slices, token_tiles);
    const auto down_kernel = aligned_inputs(shape, tensors) ? few_down<T, kTokens, true> : few_down<T, kTokens, false>;
    constexpr size_t kSumsBytes = sizeof(float) * kDownThreads / 32 * kDownRows * kTokens;
    const cudaError_t error = launch_first(down_kernel, down_grid, kDownThreads, kSumsBytes, stream, down);
    if (error != cudaSuccess) return error;

    const Columns columns = columns_of(shape);
    const FewUpArguments up{tensors.base,      tensors.mix, tensors.up,        tensors.y,
                            partials,          tokens,      shape.num_experts, shape.expert_rank,
                            shape.down_rank(), plan.slices, shape.rows(),      shape.out(),
                            shape.shared_down, columns};
    const dim3 up_grid(columns.num_tiles(kUpLanes * Pack<T>::kWidth), token_tiles);
    const auto up_kernel = aligned_outputs(shape, tensors) ? few_up<T, kTokens, true> : few_up<T, kTokens, false>;
    return launch_second(up_kernel, up_grid, kUpThreads, plan.shared_bytes, stream, up);
}

template <typename T>
cudaError_t launch_few(const MixedExpertShape& shape, const MixedExpertTensors& tensors, void* workspace,
                       cudaStream_t stream) noexcept {
    const FewTokensPlan plan = plan_few_tokens(shape);
    switch (plan.token_tile) {
        case 1:
            return launch_few<T, 1>(shape, tensors, plan, workspace, stream);
        case 4:
            return launch_few<T, 4>(shape, tensors, plan, workspace, stream);
        default:
            return launch_few<T, 8>(shape, tensors, plan, workspace, stream);
    }
}

template <typename T, int kTokenTiles, int kColumnTiles>
cudaError_t launch_down(const ManyDownArguments& arguments, dim3 grid, cudaStream_t stream) noexcept {
    using Shape = ManyDown<T, kTokenTiles, kColumnTiles>;
    return launch_kernel(many_down<T, kTokenTiles, kColumnTiles>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                         arguments);
}

template <typename T, int kTokenTiles>
cudaError_t launch_down(const ManyDownArguments& arguments, int column_tiles, dim3 grid, cudaStream_t stream) noexcept {
    switch (column_tiles) {
        case 1:
            return launch_down<T, kTokenTiles, 1>(arguments, grid, stream);
        case 3:
            return launch_down<T, kTokenTiles, 3>(arguments, grid, stream);
        default:
            return launch_down<T, kTokenTiles, 6>(arguments, grid, stream);
    }
}

template <typename T>
cudaError_t launch_many(const MixedExpertShape& shape, const MixedExpertTensors& tensors, void* workspace,
                        cudaStream_t stream) noexcept {
    const ManyTokensPlan plan = plan_many_tokens(shape);
    char* memory = static_cast<char*>(workspace);
    auto* counters = reinterpret_cast<uint32_t*>(memory + plan.counters_offset);
    auto* partials = reinterpret_cast<float*>(memory + plan.partials_offset);
    const int tokens = static_cast<int>(shape.tokens);
    const dim3 grid(static_cast<unsigned>(plan.token_blocks), shape.num_siblings * plan.chunks, plan.splits);
    cudaError_t error = plan.splits > 1 ? cudaMemsetAsync(counters, 0, plan.partials_offset, stream) : cudaSuccess;
    if (error != cudaSuccess) return error;
    const ManyDownArguments down{tensors.x,
                                 tensors.down,
                                 tensors.mix,
                                 memory + plan.values_offset,
                                 partials,
                                 counters,
                                 tokens,
                                 shape.in,
                                 shape.num_experts,
                                 shape.expert_rank,
                                 shape.down_rank(),
                                 shape.shared_down,
                                 aligned_inputs(shape, tensors),
                                 plan.chunks,
                                 plan.chunk_columns,
                                 plan.split_width,
                                 plan.value_stride};
    error = plan.token_tile == 64 ? launch_down<T, 4>(down, plan.column_tiles, grid, stream)
                                  : launch_down<T, 1>(down, plan.column_tiles, grid, stream);
    if (error != cudaSuccess) return error;

    const Columns columns = columns_of(shape);
    const ManyUpArguments up{tensors.base, tensors.up,      tensors.y,         memory + plan.values_offset,
                             tokens,       shape.up_rank(), plan.value_stride, shape.out(),
                             columns};
    const dim3 up_grid(ceil_div(tokens, ManyUp<T>::kTokens), columns.num_tiles(ManyUp<T>::kColumns));
    const auto up_kernel = aligned_outputs(shape, tensors) ? many_up<T, true> : many_up<T, false>;
    return launch_kernel(up_kernel, up_grid, ManyUp<T>::kThreads, ManyUp<T>::kSharedBytes, stream, up);
}

template <typename T>
cudaError_t launch_typed(const MixedExpertShape& shape, const MixedExpertTensors& tensors, void* workspace,
                         cudaStream_t stream) noexcept {
    return shape.tokens <= kFewTokens ? launch_few<T>(shape, tensors, workspace, stream)
                                      : launch_many<T>(shape, tensors, workspace, stream);
}

}  // namespace

cudaError_t launch(const MixedExpertShape& shape, const MixedExpertTensors& tensors, void* workspace,
                   cudaStream_t stream) noexcept {
    if (unsupported(shape) != nullptr) return cudaErrorInvalidValue;
    if (shape.tokens == 0) return cudaSuccess;
    switch (shape.dtype) {
        case DataType::kFloat32:
            return launch_typed<float>(shape, tensors, workspace, stream);
        case DataType::kFloat16:
            return launch_typed<__half>(shape, tensors, workspace, stream);
        case DataType::kBFloat16:
            return launch_typed<__nv_bfloat16>(shape, tensors, workspace, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace teamlora
