// The model's folder: what it holds, and whether the files are those that were deployed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace teamlora {

// The adapters that rows can have, each a file of its own.
struct Shelf {
    struct File {
        // Relative to the model's folder.
        std::string name;
        std::string sha256;
    };
    // So many are to be in memory at a time.
    std::size_t slots = 0;
    std::map<std::string, File> adapters;
};

struct Folder {
    std::filesystem::path path;
    std::string task;
    std::vector<std::int64_t> stop_tokens;
    std::int64_t padding = 0;
    // Ids are below it; 0: that is not known.
    std::int64_t vocabulary = 0;
    // Tokens that the model takes at most, prompt and answer together; 0: there is no limit.
    std::int64_t most_tokens = 0;
    // Some layer sees a window of the last tokens only, so that the order within the cache matters.
    bool has_window = false;
    // Rows of one batch may have padding in front.
    bool takes_padding = true;
    // Names of the engines in `engines/`.
    std::vector<std::string> engines;
    // Of the graph and its weights, and of each engine.
    std::vector<std::string> model_sha256;
    // Nothing: the model has one adapter of its own.
    std::optional<Shelf> shelf;

    std::filesystem::path description() const { return path / "deploy.json"; }

    std::filesystem::path model() const { return path / "model.onnx"; }
    std::filesystem::path engine(const std::string& name) const { return path / "engines" / (name + ".engine"); }
    std::filesystem::path plugin() const { return path / "plugins" / "libteamlora_tensorrt.so"; }
};

// Reads the folder's deploy.json; with `check`, compares every file with its hash, but for the shelf's, which is done
// when they are needed: there may be many. Throws an Error.
Folder open_folder(const std::filesystem::path& path, bool check);

}  // namespace teamlora
