// The op as ONNX Runtime sees it: one description for each T, one kernel for each node.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../kernels/cpu/projection.h"
#include "../op.h"

namespace teamlora {

// The op's inputs, by their place.
enum Input : size_t { kX, kBase, kDown, kMix, kUp, kNumInputs };

// One node. Weights that are constant are packed when the session is made, others at each call.
class MixedExpertKernel {
public:
    MixedExpertKernel(const OrtKernelInfo* info, cpu::DataType dtype);

    // Called by any number of threads at once.
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    void compute(OrtKernelContext* context);
    template <class Get>
    cpu::Projection pack(const Get& input) const;

    cpu::DataType dtype_;
    int64_t num_experts_;
    bool shared_down_;
    std::vector<int64_t> out_splits_;
    std::optional<cpu::Projection> packed_;
};

struct MixedExpertOp : Ort::CustomOpBase<MixedExpertOp, MixedExpertKernel, true> {
    explicit MixedExpertOp(cpu::DataType dtype);

    OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;
    const char* GetName() const { return kOpName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return kNumInputs; }
    ONNXTensorElementDataType GetInputType(size_t index) const;
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return GetInputType(kBase); }
    int GetStartVersion() const { return kOpVersion; }
    int GetEndVersion() const { return kOpVersion; }

private:
    cpu::DataType dtype_;
};

}  // namespace teamlora
