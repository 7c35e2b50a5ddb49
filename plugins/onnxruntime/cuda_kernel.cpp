#include "cuda_kernel.h"

#include <algorithm>

namespace teamlora {
namespace {

// Device memory for as long as a call takes to enqueue its kernels; what is enqueued later on the same stream may have
// it again.
class Scratch {
public:
    Scratch(const OrtKernelContext* context, OrtAllocator* allocator, size_t bytes, const void* stream)
        : allocator_(allocator) {
        if (bytes == 0) return;
        if (stream == nullptr) {
            memory_ = allocator->Alloc(allocator, bytes);
            if (memory_ == nullptr) throw Ort::Exception("no memory for a workspace", ORT_RUNTIME_EXCEPTION);
            return;
        }
        // Memory that other streams wait for before they have it again. The context does not take it back.
        const OrtMemoryInfo* device = nullptr;
        Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(allocator, &device));
        Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(context, device, bytes, &memory_));
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        if (memory_ != nullptr) allocator_->Free(allocator_, memory_);
    }
    void* memory() const noexcept { return memory_; }

private:
    OrtAllocator* allocator_;
    void* memory_ = nullptr;
};

// What the kernels take, or a refusal in words.
MixedExpertShape shape_of(DataType dtype, const Attributes& attributes, const Widths& widths, int64_t tokens) {
    const auto siblings = static_cast<int64_t>(attributes.out_splits.size());
    if (siblings > kMaxSiblings || attributes.num_experts > kMaxExperts ||
        std::max({widths.in, widths.out, widths.expert_rank}) > INT32_MAX) {
        refuse("the CUDA kernels take up to " + std::to_string(kMaxSiblings) + " siblings, " +
               std::to_string(kMaxExperts) + " experts and sizes below 2^31, here are " + std::to_string(siblings) +
               " and " + std::to_string(attributes.num_experts) + ".");
    }
    MixedExpertShape shape;
    shape.dtype = dtype;
    shape.tokens = tokens;
    shape.in = static_cast<int32_t>(widths.in);
    shape.num_experts = static_cast<int32_t>(attributes.num_experts);
    shape.expert_rank = static_cast<int32_t>(widths.expert_rank);
    shape.shared_down = attributes.shared_down;
    shape.num_siblings = static_cast<int32_t>(siblings);
    std::transform(attributes.out_splits.begin(), attributes.out_splits.end(), shape.out_splits,
                   [](int64_t width) { return static_cast<int32_t>(width); });
    if (const char* reason = unsupported(shape)) refuse(std::string(reason) + ".");
    return shape;
}

}  // namespace

CudaKernel::CudaKernel(const OrtKernelInfo* info, ONNXTensorElementDataType type)
    : dtype_(data_type_of<DataType>(type)), attributes_(info), takes_adapters_(takes_adapters(info)) {
    OrtAllocator* allocator = nullptr;
    Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator));
    allocator_.reset(allocator);
    // The device is asked now: the first call may be one that is captured. It tells its own errors.
    Tuning tuning;
    static_cast<void>(tuning_of_device(tuning));
}

OrtStatusPtr CudaKernel::ComputeV2(OrtKernelContext* context) noexcept {
    return as_status([&] { compute(Ort::KernelContext(context), context); });
}

MixedExpertShape CudaKernel::shape_of_call(const Ort::KernelContext& context) const {
    const Dims x = dims_of(context.GetInput(kX)), base = dims_of(context.GetInput(kBase)),
               down = dims_of(context.GetInput(kDown)), mix = dims_of(context.GetInput(kMix)),
               up = dims_of(context.GetInput(kUp));
    if (!takes_adapters_) {
        const Widths widths(attributes_, down, mix, up);
        return shape_of(dtype_, attributes_, widths, count_tokens(widths, x, base));
    }
    const SlotWidths sizes(attributes_, down, mix, up);
    const Dims adapter = dims_of(context.GetInput(kAdapter));
    const int64_t row_tokens = count_row_tokens(sizes.widths, x, base, adapter), tokens = x[0] * row_tokens;
    if (sizes.slots < 1 || sizes.slots > INT32_MAX) refuse("there are " + std::to_string(sizes.slots) + " slots.");
    MixedExpertShape shape = shape_of(dtype_, attributes_, sizes.widths, tokens);
    shape.slots = static_cast<int32_t>(sizes.slots);
    shape.row_tokens = adapter[0] == x[0] ? row_tokens : tokens;
    return shape;
}

void CudaKernel::compute(const Ort::KernelContext& context, OrtKernelContext* raw) {
    const MixedExpertShape shape = shape_of_call(context);
    const auto input = [&](Input which) { return context.GetInput(which).GetTensorRawData(); };
    Ort::UnownedValue y = context.GetOutput(0, dims_of(context.GetInput(kBase)));
    const MixedExpertTensors tensors{input(kX),
                                     input(kBase),
                                     input(kDown),
                                     static_cast<const float*>(input(kMix)),
                                     input(kUp),
                                     y.GetTensorMutableRawData(),
                                     takes_adapters_ ? static_cast<const int32_t*>(input(kAdapter)) : nullptr};
    void* const stream = context.GetGPUComputeStream();
    Tuning tuning;
    cudaError_t error = tuning_of_device(tuning);
    if (error == cudaSuccess) {
        const Scratch workspace(raw, allocator_.get(), workspace_bytes(shape, tuning), stream);
        error = launch(shape, tuning, tensors, workspace.memory(), static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) {
        throw Ort::Exception(std::string(kOpDomain) + "::" + kOpName + ": its kernels could not be launched (" +
                                 cudaGetErrorString(error) + ").",
                             ORT_RUNTIME_EXCEPTION);
    }
}

}  // namespace teamlora
