// A node of the op on a CPU.
#pragma once

#include <optional>

#include "../kernels/cpu/projection.h"
#include "op.h"

namespace teamlora {

// Weights that are constant are packed when the session is made, others at each call.
class CpuKernel {
public:
    static constexpr const char* kProvider = "CPUExecutionProvider";

    CpuKernel(const OrtKernelInfo* info, ONNXTensorElementDataType type);

    // Called by any number of threads at once.
    OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

private:
    // A projection, packed, and the sizes that it was packed for.
    struct Packed {
        Widths widths;
        cpu::Projection projection;
    };

    void compute(OrtKernelContext* context);
    template <class Get>
    Packed pack(const Get& input) const;

    cpu::DataType dtype_, weights_;
    Attributes attributes_;
    std::optional<Packed> packed_;
};

}  // namespace teamlora
