#include "tensorrt_slots.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "backend.h"

namespace teamlora {
namespace {

// As an adapter's file calls it; empty: it can have none of that type.
const char* type_in_file(Element type) {
    switch (type) {
        case Element::kFloat32:
            return "F32";
        case Element::kFloat16:
            return "F16";
        case Element::kBfloat16:
            return "BF16";
        default:
            return "";
    }
}

// Why the engine's inputs are not those of a shelf with so many slots; 0: of a model without a shelf. Empty: they are.
std::string misfit(const std::vector<Tensor>& slots, const Tensor* rows, std::size_t count) {
    if (count == 0) {
        if (rows == nullptr && slots.empty()) return "";
        return "the engine takes " + (rows == nullptr ? slots[0].name : rows->name) + ", and there is no shelf";
    }
    if (rows == nullptr || slots.empty()) return "the engine takes no adapters";
    if (rows->type != Element::kInt32 || rows->shape.size() != 1) {
        return "its input " + rows->name + " is no int32 for each row";
    }
    for (const Tensor& tensor : slots) {
        const bool fits = !tensor.shape.empty() && tensor.shape[0] == static_cast<std::int64_t>(count);
        if (!fits) return "its input " + tensor.name + " does not have the shelf's " + std::to_string(count) + " slots";
    }
    return "";
}

}  // namespace

bool has_slots(const Tensor& tensor) {
    constexpr const char* kOthers[] = {"input_ids", "attention_mask", "position_ids", "token_type_ids", kAdapterInput};
    if (!tensor.is_input || is_past(tensor.name)) return false;
    return std::none_of(std::begin(kOthers), std::end(kOthers), [&](const char* name) { return tensor.name == name; });
}

DeviceSlots::DeviceSlots(const std::vector<SlotInput>& inputs, std::size_t slots) {
    for (const SlotInput& input : inputs) {
        bytes_.push_back(input.bytes);
        memory_.emplace_back().reserve(slots * input.bytes);
        // A row without an adapter is computed with the first slot, and that is left out then.
        check(cudaMemsetAsync(memory_.back().get(), 0, slots * input.bytes, stream_.get()), "The GPU failed");
    }
    stream_.wait();
}

void DeviceSlots::fill(std::size_t slot, const SlotFile& file) {
    for (std::size_t input = 0; input < memory_.size(); ++input) {
        check(cudaMemcpyAsync(static_cast<char*>(of(input)) + slot * bytes_[input], file.tensors[input].data(),
                              bytes_[input], cudaMemcpyHostToDevice, stream_.get()),
              "The GPU failed");
    }
    stream_.wait();
}

TensorRTSlots::TensorRTSlots(const Engine& engine, const Folder& folder, const Options& options) {
    const Tensor* rows = nullptr;
    for (const Tensor& tensor : engine.tensors()) {
        if (has_slots(tensor)) tensors_.push_back(tensor);
        if (tensor.is_input && tensor.name == kAdapterInput) rows = &tensor;
    }
    const std::size_t count = folder.shelf ? folder.shelf->slots : 0;
    const std::string why = misfit(tensors_, rows, count);
    if (!why.empty()) {
        throw Error(folder.path.string() + ": its engine and its shelf of adapters do not belong together (" + why +
                    "). Deploy it again.");
    }
    if (count == 0) return;
    std::vector<SlotInput> inputs;
    for (const Tensor& tensor : tensors_) {
        inputs.push_back(slot_input(tensor.name, type_in_file(tensor.type), size_of(tensor.type), tensor.shape));
    }
    memory_ = std::make_unique<DeviceSlots>(inputs, count);
    adapters_ = std::make_unique<Adapters>(folder, options, std::move(inputs), *memory_);
}

void TensorRTSlots::bind(Context& context) const {
    for (std::size_t i = 0; i < tensors_.size(); ++i) context.bind(tensors_[i], memory_->of(i));
}

Slots TensorRTSlots::rows(const Slots& held, std::size_t batch) const {
    if (adapters_ == nullptr) return {};
    return held.empty() ? Slots(batch, kNoAdapter) : held;
}

}  // namespace teamlora
