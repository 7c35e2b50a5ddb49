// The op as ONNX Runtime sees it, whichever provider runs it: one description for each T, one kernel for each node.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <exception>
#include <string>
#include <vector>

#include "../op.h"

namespace teamlora {

// The op's inputs, by their place.
enum Input : size_t { kX, kBase, kDown, kMix, kUp, kAdapter, kNumInputs };

using Dims = std::vector<int64_t>;

// Throws an Ort::Exception that names the op.
[[noreturn]] void refuse(const std::string& why);

// "[2, 3]"
std::string text(const Dims& dims);

// A node's attributes. The constructor refuses what is none.
struct Attributes {
    explicit Attributes(const OrtKernelInfo* info);

    int64_t num_experts;
    bool shared_down;
    std::vector<int64_t> out_splits;
};

// Sizes that follow from the weights. The constructor refuses shapes that do not belong together.
struct Widths {
    Widths(const Attributes& attributes, const Dims& down, const Dims& mix, const Dims& up);

    int64_t in, expert_rank, out;
};

// How many tokens x has, whose last dimension is `in`. Refuses x and base where they are not [.., in] and [.., out].
int64_t count_tokens(const Widths& widths, const Dims& x, const Dims& base);

// Whether a node has the optional input, and so an adapter for each row.
bool takes_adapters(const OrtKernelInfo* info);

// Sizes of version 2, whose weights have a leading dimension of slots. The constructor refuses what does not belong
// together.
struct SlotWidths {
    SlotWidths(const Attributes& attributes, const Dims& down, const Dims& mix, const Dims& up);

    int64_t slots;
    Widths widths;
};

// How many tokens a row of x [batch, tokens, in] has, whose indices have the shape `adapter`. Refuses what does not
// belong together, as `count_tokens` does.
int64_t count_row_tokens(const Widths& widths, const Dims& x, const Dims& base, const Dims& adapter);

// The shape of a tensor, [] where there is none.
template <class Value>
Dims dims_of(const Value& tensor) {
    return tensor.GetTensorTypeAndShapeInfo().GetShape();
}

// What `work` throws, as ONNX Runtime takes it and releases it.
template <class Work>
OrtStatusPtr as_status(const Work& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (const Ort::Exception& error) {
        return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
        return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
    }
}

// The inputs' and outputs' part of a description. y is like `base`: it has its shape, and where ONNX Runtime knows that
// nobody else reads `base`, it may have its memory.
void let_output_be_base(OrtCustomOp& op);

// `Kernel` names its provider as kProvider, is made of an OrtKernelInfo and T, and has ComputeV2. `weights` is the type
// of down and up, where it is not T.
template <class Kernel>
struct MixedExpertOp : Ort::CustomOpBase<MixedExpertOp<Kernel>, Kernel, true> {
    explicit MixedExpertOp(ONNXTensorElementDataType type) : MixedExpertOp(type, type) {}
    MixedExpertOp(ONNXTensorElementDataType type, ONNXTensorElementDataType weights) : type_(type), weights_(weights) {
        let_output_be_base(*this);
    }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
        return as_status([&] { *kernel = new Kernel(info, type_); });
    }
    const char* GetName() const { return kOpName; }
    const char* GetExecutionProviderType() const { return Kernel::kProvider; }
    size_t GetInputTypeCount() const { return kNumInputs; }
    ONNXTensorElementDataType GetInputType(size_t index) const {
        if (index == kAdapter) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        if (index == kDown || index == kUp) return weights_;
        return index == kMix ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type_;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return index == kAdapter ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return type_; }
    int GetStartVersion() const { return kOpVersion; }
    int GetEndVersion() const { return kOpAdaptersVersion; }

private:
    ONNXTensorElementDataType type_, weights_;
};

// One of the three that T may be, in a kernel's own words.
template <class DataType>
DataType data_type_of(ONNXTensorElementDataType type) noexcept {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return DataType::kFloat32;
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? DataType::kFloat16 : DataType::kBFloat16;
}

}  // namespace teamlora
