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
    : dtype_(data_type_of<DataType>(type)), attributes_(info) {
    if (takes_adapters(info)) {
        refuse("an adapter for each row (version 2) has no CUDA kernels yet; the CPU provider runs it.");
    }
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

void CudaKernel::compute(const Ort::KernelContext& context, OrtKernelContext* raw) {
    const Ort::ConstValue x = context.GetInput(kX), base = context.GetInput(kBase), down = context.GetInput(kDown),
                          mix = context.GetInput(kMix), up = context.GetInput(kUp);
    const Widths widths(attributes_, dims_of(down), dims_of(mix), dims_of(up));
    const Dims dims = dims_of(base);
    const MixedExpertShape shape = shape_of(dtype_, attributes_, widths, count_tokens(widths, dims_of(x), dims));
    Ort::UnownedValue y = context.GetOutput(0, dims);
    const MixedExpertTensors tensors{x.GetTensorRawData(),       base.GetTensorRawData(), down.GetTensorRawData(),
                                     mix.GetTensorData<float>(), up.GetTensorRawData(),   y.GetTensorMutableRawData()};
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
