#include "onnxruntime_slots.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "error.h"

namespace teamlora {
namespace {

// As an adapter's file calls it, and the bytes of a number.
std::pair<const char*, std::size_t> type_in_file(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return {"F32", 4};
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return {"F16", 2};
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return {"BF16", 2};
        default:
            return {"", 0};
    }
}

}  // namespace

HostSlots::HostSlots(const std::vector<SlotInput>& inputs, std::size_t slots) {
    for (const SlotInput& input : inputs) memory_.emplace_back(slots * input.bytes);
}

void HostSlots::fill(std::size_t slot, const SlotFile& file) {
    for (std::size_t input = 0; input < memory_.size(); ++input) {
        const std::string_view numbers = file.tensors[input];
        std::copy(numbers.begin(), numbers.end(), of(input) + slot * numbers.size());
    }
}

OnnxRuntimeSlots::OnnxRuntimeSlots(const Ort::Session& session, const Folder& folder, const Options& options) {
    const Ort::AllocatorWithDefaultOptions allocator;
    std::vector<SlotInput> inputs;
    bool has_rows = false;
    for (std::size_t i = 0; i < session.GetOverridableInitializerCount(); ++i) {
        const std::string name = session.GetOverridableInitializerNameAllocated(i, allocator).get();
        if (name == kAdapterInput) has_rows = true;
        if (name == kAdapterInput || !folder.shelf) continue;
        const Ort::TypeInfo info = session.GetOverridableInitializerTypeInfo(i);
        const auto tensor = info.GetTensorTypeAndShapeInfo();
        const auto [type, width] = type_in_file(tensor.GetElementType());
        inputs.push_back(slot_input(name, type, width, tensor.GetShape()));
        types_.push_back(tensor.GetElementType());
    }
    if (has_rows != folder.shelf.has_value()) {
        throw Error(folder.path.string() + ": its model and its shelf of adapters do not belong together.");
    }
    if (!has_rows) return;
    memory_ = std::make_unique<HostSlots>(inputs, folder.shelf->slots);
    adapters_ = std::make_unique<Adapters>(folder, options, std::move(inputs), *memory_);
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
        values.push_back(Ort::Value::CreateTensor(memory, memory_->of(i), adapters_->slots() * input.bytes,
                                                  shape.data(), shape.size(), types_[i]));
    }
    const bool same = std::adjacent_find(rows.begin(), rows.end(), std::not_equal_to<>()) == rows.end();
    const std::size_t count = same ? 1 : rows.size();
    const auto size = static_cast<std::int64_t>(count);
    values.push_back(
        Ort::Value::CreateTensor<std::int32_t>(memory, const_cast<std::int32_t*>(rows.data()), count, &size, 1));
}

}  // namespace teamlora
