// Where rows have adapters: the model's inputs that have a slot for each adapter in memory, and the one that has the
// slot of each row. They are inputs with a default, which a caller may leave out.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <memory>
#include <string>
#include <vector>

#include "adapters.h"

namespace teamlora {

// The slots of each input in the host's memory: [slots, shape of one], which stay where they are.
class HostSlots : public SlotMemory {
public:
    HostSlots(const std::vector<SlotInput>& inputs, std::size_t slots);
    void fill(std::size_t slot, const SlotFile& file) override;
    char* of(std::size_t input) { return memory_[input].data(); }

private:
    std::vector<std::vector<char>> memory_;
};

class OnnxRuntimeSlots {
public:
    // Nothing, of a model with one adapter of its own.
    OnnxRuntimeSlots() = default;
    // Throws an Error where the model and the folder's shelf do not belong together.
    OnnxRuntimeSlots(const Ort::Session& session, const Folder& folder, const Options& options);

    Adapters* adapters() const { return adapters_.get(); }
    // Adds the names of these inputs, and their values; `rows` is read in place.
    void add_names(std::vector<const char*>& names) const;
    void add_values(std::vector<Ort::Value>& values, const Slots& rows) const;

private:
    std::vector<ONNXTensorElementDataType> types_;
    std::unique_ptr<HostSlots> memory_;
    std::unique_ptr<Adapters> adapters_;
};

}  // namespace teamlora
