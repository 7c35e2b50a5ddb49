#include "onnxruntime_slots.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "error.h"

namespace teamlora {
namespace {

// An index for each row, or one for all.
constexpr const char* kAdapterInput = "adapter";

// Of an input [slots, shape of one].
SlotInput slot_input(std::string name, ONNXTensorElementDataType type, const std::vector<std::int64_t>& shape) {
    const bool floats = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    const bool halves = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    SlotInput input{std::move(name), floats ? "F32" : halves ? "F16" : "BF16", {}, floats ? 4u : 2u};
    bool known = (floats || halves || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) && !shape.empty();
    for (std::size_t axis = 1; axis < shape.size(); ++axis) {
        known = known && shape[axis] >= 0;
        input.shape.push_back(shape[axis]);
        input.bytes *= static_cast<std::size_t>(shape[axis]);
    }
    if (!known) throw Error("The model's slots " + input.name + " are not of a kind that this program knows.");
    return input;
}

}  // namespace

OnnxRuntimeSlots::OnnxRuntimeSlots(const Ort::Session& session, const Folder& folder, bool check) {
    const Ort::AllocatorWithDefaultOptions allocator;
    std::vector<SlotInput> inputs;
    bool has_rows = false;
    for (std::size_t i = 0; i < session.GetOverridableInitializerCount(); ++i) {
        const std::string name = session.GetOverridableInitializerNameAllocated(i, allocator).get();
        if (name == kAdapterInput) has_rows = true;
        if (name == kAdapterInput || !folder.shelf) continue;
        const Ort::TypeInfo info = session.GetOverridableInitializerTypeInfo(i);
        const auto tensor = info.GetTensorTypeAndShapeInfo();
        inputs.push_back(slot_input(name, tensor.GetElementType(), tensor.GetShape()));
        types_.push_back(tensor.GetElementType());
    }
    if (has_rows != folder.shelf.has_value()) {
        throw Error(folder.path.string() + ": its model and its shelf of adapters do not belong together.");
    }
    if (has_rows) adapters_ = std::make_unique<Adapters>(folder, check, std::move(inputs));
}

void OnnxRuntimeSlots::add_names(std::vector<const char*>& names) const {
    if (adapters_ == nullptr) return;
    for (const SlotInput& input : adapters_->inputs()) names.push_back(input.name.c_str());
    names.push_back(kAdapterInput);
}

void OnnxRuntimeSlots::add_values(std::vector<Ort::Value>& values, const Slots& rows) const {
    if (adapters_ == nullptr) return;
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    for (std::size_t i = 0; i < types_.size(); ++i) {
        const SlotInput& input = adapters_->inputs()[i];
        std::vector<std::int64_t> shape{static_cast<std::int64_t>(adapters_->slots())};
        shape.insert(shape.end(), input.shape.begin(), input.shape.end());
        values.push_back(Ort::Value::CreateTensor(memory, adapters_->memory(i), adapters_->slots() * input.bytes,
                                                  shape.data(), shape.size(), types_[i]));
    }
    const bool same = std::adjacent_find(rows.begin(), rows.end(), std::not_equal_to<>()) == rows.end();
    const std::size_t count = same ? 1 : rows.size();
    const auto size = static_cast<std::int64_t>(count);
    values.push_back(
        Ort::Value::CreateTensor<std::int32_t>(memory, const_cast<std::int32_t*>(rows.data()), count, &size, 1));
}

}  // namespace teamlora
