#include "folder.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "error.h"
#include "hash.h"

namespace teamlora {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// 2 is what has a shelf of adapters.
constexpr std::int64_t kFormatVersion = 2;
constexpr std::int64_t kLargestId = std::int64_t{1} << 31;
constexpr std::int64_t kMostSlots = 4096;
constexpr std::size_t kHashDigits = 64;
// Of an adapter's hash, in the name of its file.
constexpr std::size_t kNamedDigits = 16;
constexpr std::uintmax_t kLargestJson = 64u << 20;
// What is opened in a model's folder: a list of hashes without one of them is not whole.
constexpr const char* kOpened[] = {"model.onnx",
                                   "model.onnx.data",
                                   "adapter.onnx.data",
                                   "tokenizer.json",
                                   "tokenizer_config.json",
                                   "genai_config.json",
                                   "plugins/libteamlora_tensorrt.so"};

bool is_file(const fs::path& path) {
    std::error_code error;
    return fs::is_regular_file(path, error);
}

json read_json(const fs::path& path) {
    std::error_code failed;
    const std::uintmax_t size = fs::file_size(path, failed);
    if (failed || size > kLargestJson) throw Error(path.string() + ": is no file of a size that it can have.");
    std::ifstream file(path);
    try {
        return json::parse(file);
    } catch (const json::exception& error) {
        throw Error(path.string() + ": cannot be read (" + error.what() + "). Copy the folder again.");
    }
}

std::string sha256_of(const fs::path& path) {
    // Opening a FIFO would wait for a writer.
    std::ifstream file;
    if (is_file(path)) file.open(path, std::ios::binary);
    if (!file.is_open()) throw Error(path.string() + ": is missing or cannot be read. Copy the folder again.");
    std::vector<char> block(1 << 20);
    Sha256 sum;
    while (file) {
        file.read(block.data(), static_cast<std::streamsize>(block.size()));
        sum.add(block.data(), static_cast<std::size_t>(file.gcount()));
    }
    return sum.digits();
}

bool stays_inside(const fs::path& relative) {
    if (relative.empty() || relative.is_absolute()) return false;
    for (const auto& part : relative) {
        if (part == "..") return false;
    }
    return true;
}

bool is_engine(const fs::path& file) { return file.parent_path() == "engines" && file.extension() == ".engine"; }

void check_files(const fs::path& folder, const std::map<std::string, std::string>& files) {
    const fs::path described = folder / "deploy.json";
    const bool has_graph = files.count("model.onnx") != 0 && files.count("model.onnx.data") != 0;
    const bool has_engine =
        std::any_of(files.begin(), files.end(), [](const auto& file) { return is_engine(file.first); });
    if (!has_graph && !has_engine) throw Error(described.string() + ": lists no model. Copy the folder again.");
    for (const char* name : kOpened) {
        if (is_file(folder / name) && files.count(name) == 0) {
            throw Error(described.string() + ": does not list " + name + ". Copy the folder again.");
        }
    }
    for (const auto& [name, expected] : files) {
        if (!stays_inside(name)) {
            throw Error(described.string() + ": names " + name + ", which is not in its folder.");
        }
        if (sha256_of(folder / name) != expected) {
            throw Error((folder / name).string() +
                        ": is not the file that belongs here (its SHA-256 differs). Copy it again.");
        }
    }
}

// A whole number from `least` on; 0 for null.
std::int64_t whole(const json& value, std::int64_t least) {
    if (value.is_null()) return 0;
    const bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() < kLargestId;
    if (!fits || value.get<std::int64_t>() < least) {
        throw Error("a number is not as it should be: " + value.dump().substr(0, 40));
    }
    return value.get<std::int64_t>();
}

void read_tokens(const json& tokens, Folder& folder) {
    folder.vocabulary = whole(tokens.at("vocabulary"), 1);
    folder.padding = whole(tokens.at("padding"), 0);
    folder.most_tokens = whole(tokens.at("most"), 1);
    folder.has_window = tokens.at("windowed").get<bool>();
    folder.takes_padding = tokens.value("padded", true);
    for (const json& stop : tokens.at("stops").get<std::vector<json>>()) {
        folder.stop_tokens.push_back(whole(stop, 0));
    }
}

// The adapters that deploy.json lists, whose hashes are among those of `files`.
std::optional<Shelf> read_shelf(const json& deployed, const std::map<std::string, std::string>& files) {
    if (!deployed.contains("shelf") || deployed["shelf"].is_null()) return {};
    Shelf shelf;
    const std::int64_t slots = whole(deployed["shelf"].at("slots"), 1);
    if (slots < 1 || slots > kMostSlots) throw Error("its shelf has slots that are not as they should be");
    shelf.slots = static_cast<std::size_t>(slots);
    for (const auto& [name, fields] : deployed["shelf"].at("adapters").get<std::map<std::string, json>>()) {
        const auto file = fields.at("file").get<std::string>();
        const auto listed = files.find(file);
        if (listed == files.end() || listed->second.size() != kHashDigits || !stays_inside(file)) {
            throw Error("its adapter " + name.substr(0, 80) + " is not as it should be");
        }
        // What is in memory is known by its hash, also where nothing is compared with it.
        const std::string named = "." + listed->second.substr(0, kNamedDigits) + ".safetensors";
        const bool ends =
            file.size() >= named.size() && file.compare(file.size() - named.size(), named.size(), named) == 0;
        if (!ends || fields.at("sha256").get<std::string>() != listed->second) {
            throw Error("its adapter " + name.substr(0, 80) + " has more than one hash");
        }
        shelf.adapters[name] = {file, listed->second};
    }
    return shelf;
}

}  // namespace

Folder open_folder(const fs::path& path, bool check) {
    Folder folder;
    folder.path = path;
    const fs::path described = folder.description();
    if (!is_file(described)) {
        throw Error(path.string() + ": holds no deploy.json. Is it the model's folder?");
    }
    const json deployed = read_json(described);
    std::map<std::string, std::string> files;
    try {
        const std::int64_t version = whole(deployed.at("format_version"), 1);
        if (version > kFormatVersion) {
            throw Error("a newer teamlora-export wrote it, whose own program opens it");
        }
        folder.task = deployed.at("task").get<std::string>();
        read_tokens(deployed.at("tokens"), folder);
        deployed.at("files").get_to(files);
        folder.shelf = read_shelf(deployed, files);
    } catch (const std::exception& error) {
        throw Error(described.string() + ": cannot be read (" + error.what() + "). Copy the folder again.");
    }
    for (const char* name : {"model.onnx", "model.onnx.data"}) {
        const auto listed = files.find(name);
        folder.model_sha256.push_back(listed == files.end() ? "" : listed->second);
    }
    for (const auto& [name, sha256] : files) {
        if (!is_engine(name)) continue;
        folder.engines.push_back(fs::path(name).stem().string());
        folder.model_sha256.push_back(sha256);
    }
    if (folder.shelf) {
        for (const auto& adapter : folder.shelf->adapters) files.erase(adapter.second.name);
    }
    if (check) check_files(path, files);
    return folder;
}

}  // namespace teamlora
