#include "folder.h"

#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "error.h"

namespace teamlora {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kFormatVersion = 1;

json read_json(const fs::path& path) {
    std::ifstream file(path);
    if (!file) return json::object();
    try {
        return json::parse(file);
    } catch (const json::exception& error) {
        throw Error(path.string() + ": cannot be read (" + error.what() + "). Copy it again.");
    }
}

std::string sha256(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(path.string() + ": is missing or cannot be read. Copy the folder again.");
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

void check_files(const fs::path& folder, const json& files) {
    for (const auto& [name, expected] : files.items()) {
        if (!stays_inside(name)) {
            throw Error((folder / "deploy.json").string() + ": names " + name + ", which is not in its folder.");
        }
        if (sha256(folder / name) != expected.get<std::string>()) {
            throw Error((folder / name).string() +
                        ": is not the file that belongs here (its SHA-256 differs). Copy it again.");
        }
    }
}

// The first of `names` that is a number in `config`.
std::int64_t number(const json& config, std::initializer_list<const char*> names) {
    for (const char* name : names) {
        if (config.contains(name) && config[name].is_number_integer()) return config[name].get<std::int64_t>();
    }
    return 0;
}

bool has_window(const json& config) {
    const auto kinds = config.find("layer_types");
    if (kinds != config.end() && kinds->is_array()) {
        for (const auto& kind : *kinds) {
            if (kind != "full_attention") return true;
        }
        return false;
    }
    return number(config, {"sliding_window", "local_attention"}) > 0;
}

}  // namespace

Folder open_folder(const fs::path& path, bool check) {
    const fs::path described = path / "deploy.json";
    if (!fs::is_regular_file(described)) {
        throw Error(path.string() + ": holds no deploy.json. Is it the model's folder?");
    }
    const json deployed = read_json(described);
    json config = read_json(path / "config.json");
    Folder folder;
    try {
        if (deployed.at("format_version").get<int>() > kFormatVersion) {
            throw Error(described.string() + ": was written by a newer teamlora-export. Use that version's program.");
        }
        if (check) check_files(path, deployed.at("files"));
        config.update(read_json(path / "generation_config.json"));
        folder.path = path;
        folder.task = deployed.at("task").get<std::string>();
        for (const auto& [name, hash] : deployed.at("files").items()) {
            const fs::path file(name);
            if (file.parent_path() == "engines" && file.extension() == ".engine") {
                folder.engines.push_back(file.stem().string());
            }
        }
        const json stops = config.value("eos_token_id", json());
        if (stops.is_number_integer()) folder.stop_tokens = {stops.get<std::int64_t>()};
        if (stops.is_array()) folder.stop_tokens = stops.get<std::vector<std::int64_t>>();
    } catch (const json::exception& error) {
        throw Error(described.string() + ": cannot be read (" + error.what() + "). Copy the folder again.");
    }
    folder.padding = number(config, {"pad_token_id"});
    folder.vocabulary = number(config, {"vocab_size"});
    folder.most_positions = number(config, {"max_position_embeddings", "n_positions"});
    folder.has_window = has_window(config);
    return folder;
}

}  // namespace teamlora
