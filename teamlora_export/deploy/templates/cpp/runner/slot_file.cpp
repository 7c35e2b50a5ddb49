#include "slot_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "error.h"
#include "hash.h"

namespace teamlora {
namespace {

using nlohmann::json;

constexpr std::size_t kLargestHeader = 64u << 20;
constexpr std::size_t kLengthBytes = 8;

std::string shape_text(const std::vector<std::int64_t>& shape) { return json(shape).dump(); }

// The header, and where the numbers begin.
std::pair<json, std::size_t> split(const std::vector<char>& data) {
    std::uint64_t length = 0;
    for (std::size_t i = kLengthBytes; data.size() >= kLengthBytes && i-- > 0;) {
        length = length << 8 | static_cast<unsigned char>(data[i]);
    }
    if (data.size() < kLengthBytes || length < 2 || length > kLargestHeader || length > data.size() - kLengthBytes) {
        throw Error("its header is not in it");
    }
    const std::size_t start = kLengthBytes + length;
    json header = json::parse(data.begin() + kLengthBytes, data.begin() + static_cast<std::ptrdiff_t>(start));
    if (!header.is_object()) throw Error("its header is no JSON object");
    return {std::move(header), start};
}

// The numbers of a tensor of `bytes` bytes, which `fields` says where to find in `body`.
std::string_view numbers(const json& fields, std::size_t bytes, std::string_view body) {
    const json& offsets = fields.at("data_offsets");
    if (offsets.size() != 2 || !offsets.at(0).is_number_unsigned() || !offsets.at(1).is_number_unsigned()) {
        throw Error("a tensor is not where it should be");
    }
    const auto start = offsets[0].get<std::uint64_t>(), end = offsets[1].get<std::uint64_t>();
    if (start > end || end > body.size() || end - start != bytes) throw Error("a tensor is not where it should be");
    return body.substr(start, bytes);
}

}  // namespace

SlotInput slot_input(std::string name, std::string type, std::size_t width, const std::vector<std::int64_t>& shape) {
    SlotInput input{std::move(name), std::move(type), {}, width};
    bool known = !input.type.empty() && !shape.empty();
    for (std::size_t axis = 1; axis < shape.size(); ++axis) {
        known = known && shape[axis] >= 0;
        input.shape.push_back(shape[axis]);
        input.bytes *= static_cast<std::size_t>(shape[axis]);
    }
    if (!known) throw Error("The model's slots " + input.name + " are not of a kind that this program knows.");
    return input;
}

OpenedFile::OpenedFile(std::filesystem::path path) : path_(std::move(path)) {
    // Opening a FIFO would wait for a writer.
    descriptor_ = open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor_ < 0) throw Error(path_.string() + ": cannot be read (" + std::strerror(errno) + ").");
    struct stat found{};
    if (fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) {
        close(descriptor_);
        throw Error(path_.string() + ": cannot be read (it is not a regular file).");
    }
}

OpenedFile::~OpenedFile() { close(descriptor_); }

std::vector<char> OpenedFile::read(std::size_t most) const {
    struct stat found{};
    if (fstat(descriptor_, &found) != 0) throw Error(path_.string() + ": cannot be read.");
    if (static_cast<std::uint64_t>(found.st_size) > most) {
        throw Error(path_.string() + ": is no file of an adapter (it has " + std::to_string(found.st_size) +
                    " bytes).");
    }
    std::vector<char> data(static_cast<std::size_t>(found.st_size));
    std::size_t done = 0;
    while (done < data.size()) {
        // From its own place each time: others may read the same file.
        const ssize_t some = pread(descriptor_, data.data() + done, data.size() - done, static_cast<off_t>(done));
        if (some < 0 && errno == EINTR) continue;
        if (some <= 0) throw Error(path_.string() + ": cannot be read to its end.");
        done += static_cast<std::size_t>(some);
    }
    return data;
}

SlotFile read_slot(const OpenedFile& file, const std::string& sha256, const std::vector<SlotInput>& inputs) {
    const std::string name = file.path().string();
    std::size_t most = kLargestHeader;
    for (const SlotInput& input : inputs) most += input.bytes;
    SlotFile found{file.read(most), {}};
    if (!sha256.empty()) {
        Sha256 sum;
        sum.add(found.data.data(), found.data.size());
        if (sum.digits() != sha256) {
            throw Error(name + ": is not the file that belongs here (its SHA-256 differs). Copy it again.");
        }
    }
    std::string misfit;
    try {
        const auto [header, start] = split(found.data);
        const std::string_view body(found.data.data() + start, found.data.size() - start);
        for (const SlotInput& input : inputs) {
            const auto there = header.find(input.name);
            const bool known = there != header.end();
            const std::string type = known ? there->at("dtype").get<std::string>() : "";
            const auto shape = known ? there->at("shape").get<std::vector<std::int64_t>>() : input.shape;
            if (type != input.type || shape != input.shape) {
                misfit = "has " + (known ? type + " " + shape_text(shape) : "nothing") + " for " + input.name +
                         ", expected " + input.type + " " + shape_text(input.shape);
                break;
            }
            found.tensors.push_back(numbers(*there, input.bytes, body));
        }
        if (misfit.empty() && header.size() != inputs.size() + header.count("__metadata__")) {
            misfit = "has more than the model takes";
        }
    } catch (const std::exception& error) {
        throw Error(name + ": is no file of an adapter (" + std::string(error.what()).substr(0, 200) + ").");
    }
    if (!misfit.empty()) throw Error(name + ": " + misfit + ". Is it of another model?");
    return found;
}

}  // namespace teamlora
