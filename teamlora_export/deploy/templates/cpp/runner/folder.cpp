#include "folder.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "error.h"

namespace teamlora {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::int64_t kFormatVersion = 1;
constexpr std::int64_t kLargestId = std::int64_t{1} << 31;
constexpr std::uintmax_t kLargestJson = 64u << 20;
// What is opened in a model's folder: a list of hashes without one of them is not whole.
constexpr const char* kOpened[] = {"model.onnx",     "model.onnx.data",       "adapter.onnx.data",
                                   "tokenizer.json", "tokenizer_config.json", "genai_config.json"};

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

std::string sha256(const fs::path& path) {
    // Opening a FIFO would wait for a writer.
    std::ifstream file;
    if (is_file(path)) file.open(path, std::ios::binary);
    if (!file.is_open()) throw Error(path.string() + ": is missing or cannot be read. Copy the folder again.");
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    std::vector<char> block(1 << 20);
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int size = 0;
    bool fine = context != nullptr && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
    while (fine && file) {
        file.read(block.data(), static_cast<std::streamsize>(block.size()));
        fine = EVP_DigestUpdate(context.get(), block.data(), static_cast<std::size_t>(file.gcount())) == 1;
    }
    if (!fine || EVP_DigestFinal_ex(context.get(), digest.data(), &size) != 1) {
        throw Error(path.string() + ": its SHA-256 cannot be computed.");
    }
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
        constexpr char kDigits[] = "0123456789abcdef";
        text += {kDigits[digest[i] >> 4], kDigits[digest[i] & 15]};
    }
    return text;
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
        if (sha256(folder / name) != expected) {
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

}  // namespace

Folder open_folder(const fs::path& path, bool check) {
    const fs::path described = path / "deploy.json";
    if (!is_file(described)) {
        throw Error(path.string() + ": holds no deploy.json. Is it the model's folder?");
    }
    const json deployed = read_json(described);
    Folder folder;
    folder.path = path;
    std::map<std::string, std::string> files;
    try {
        const std::int64_t version = whole(deployed.at("format_version"), 1);
        if (version > kFormatVersion) {
            throw Error("a newer teamlora-export wrote it, whose own program opens it");
        }
        folder.task = deployed.at("task").get<std::string>();
        read_tokens(deployed.at("tokens"), folder);
        deployed.at("files").get_to(files);
    } catch (const std::exception& error) {
        throw Error(described.string() + ": cannot be read (" + error.what() + "). Copy the folder again.");
    }
    for (const auto& file : files) {
        if (is_engine(file.first)) folder.engines.push_back(fs::path(file.first).stem().string());
    }
    if (check) check_files(path, files);
    return folder;
}

}  // namespace teamlora
