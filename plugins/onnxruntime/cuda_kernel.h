// A node of the op in ONNX Runtime's CUDA provider: the kernels of the TensorRT plugin, on the provider's stream.
#pragma once

#include <memory>

#include "mixed_expert.h"
#include "op.h"

// The emulated kernels of plugins/tests run in the CPU provider.
#ifndef TEAMLORA_CUDA_PROVIDER
#define TEAMLORA_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace teamlora {

// Every input is in the device's memory, mix and the indices of adapters too. Weights are read as they are, so it makes
// no difference whether they are constant.
class CudaKernel {
public:
    static constexpr const char* kProvider = TEAMLORA_CUDA_PROVIDER;

    CudaKernel(const OrtKernelInfo* info, ONNXTensorElementDataType type);

    // Called by any number of threads at once.
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    struct ReleaseAllocator {
        void operator()(OrtAllocator* allocator) const noexcept { Ort::GetApi().ReleaseAllocator(allocator); }
    };

    MixedExpertShape shape_of_call(const Ort::KernelContext& context) const;
    void compute(const Ort::KernelContext& context, OrtKernelContext* raw);

    DataType dtype_;
    Attributes attributes_;
    bool takes_adapters_;
    // The provider's, of the device's memory.
    std::unique_ptr<OrtAllocator, ReleaseAllocator> allocator_;
};

}  // namespace teamlora
