// Where rows have adapters: the engine's inputs that have a slot for each adapter in memory, and the one that has the
// slot of each row. Slots are device memory at addresses that stay, shared by all lanes: a step that was recorded reads
// what is in them when it is launched.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "adapters.h"
#include "cuda.h"
#include "tensorrt_engine.h"

namespace teamlora {

// The slots of each input: [slots, shape of one].
class DeviceSlots : public SlotMemory {
public:
    // Zeros. Throws an Error where the GPU has no memory for them.
    DeviceSlots(const std::vector<SlotInput>& inputs, std::size_t slots);
    // Copies in a stream of its own, and waits for it.
    void fill(std::size_t slot, const SlotFile& file) override;
    void* of(std::size_t input) const { return memory_[input].get(); }

private:
    std::vector<std::size_t> bytes_;
    std::vector<DeviceBuffer> memory_;
    Stream stream_;
};

class TensorRTSlots {
public:
    // Nothing, of an engine with one adapter of its own. Throws an Error where the engine and the folder's shelf do not
    // belong together.
    TensorRTSlots(const Engine& engine, const Folder& folder, const Options& options);

    Adapters* adapters() const { return adapters_.get(); }
    // Binds all slots to a context, once: their shapes and addresses stay.
    void bind(Context& context) const;
    // The slot of each of a request's rows, as the engine takes them: none where it takes none.
    Slots rows(const Slots& held, std::size_t batch) const;

private:
    // In the order of the adapters' inputs.
    std::vector<Tensor> tensors_;
    std::unique_ptr<DeviceSlots> memory_;
    std::unique_ptr<Adapters> adapters_;
};

// Whether it is an input with slots: none of those that every model has, and not the slot of each row.
bool has_slots(const Tensor& tensor);

}  // namespace teamlora
