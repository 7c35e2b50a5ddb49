// An adapter's file: a safetensors file with the numbers of one slot for each of the model's inputs that have slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace teamlora {

// An input of the model that has a slot for each adapter in memory.
struct SlotInput {
    std::string name;
    // As a safetensors file calls it: F32, F16 or BF16.
    std::string type;
    // Of one slot, and how many bytes that is.
    std::vector<std::int64_t> shape;
    std::size_t bytes;
};

// Of an input [slots, shape of one], whose numbers have `width` bytes each. Throws an Error where the shape of one is
// not known, or `type` is none that a file can have: it is empty.
SlotInput slot_input(std::string name, std::string type, std::size_t width, const std::vector<std::int64_t>& shape);

// A regular file that was opened, and can be read when its name is gone.
class OpenedFile {
public:
    // Throws an Error that begins with its path.
    explicit OpenedFile(std::filesystem::path path);
    ~OpenedFile();
    OpenedFile(const OpenedFile&) = delete;
    OpenedFile& operator=(const OpenedFile&) = delete;

    const std::filesystem::path& path() const { return path_; }
    // Throws an Error where it has more than `most` bytes, which may not fit into memory.
    std::vector<char> read(std::size_t most) const;

private:
    std::filesystem::path path_;
    int descriptor_;
};

// What an adapter's file has for each of `inputs`, in their order.
struct SlotFile {
    std::vector<char> data;
    std::vector<std::string_view> tensors;
};

// Reads and looks at all of it. `sha256`: of the file, which is compared with it; empty: that is left out. Throws an
// Error where it cannot be read, is another file than it was, or does not fit.
SlotFile read_slot(const OpenedFile& file, const std::string& sha256, const std::vector<SlotInput>& inputs);

}  // namespace teamlora
