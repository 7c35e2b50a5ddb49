// Runs an exported model: text generation with a KV cache, or the vectors and scores of other tasks.
//
//     teamlora::Runner runner("model");
//     auto answers = runner.generate({{504, 3575, 282}}, 64);
//
// A Runner may be used by many threads at once: it holds no state of a request. Whatever goes wrong is an Error, whose
// message says what and where. The words of a prompt become tokens in tokenizer.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "error.h"

namespace teamlora {

class Backend;
struct Folder;
struct Shelved;

using Tokens = std::vector<std::int64_t>;

// The names of adapters, one for each row; nothing in place of one: the base alone. None at all: the base alone for
// all.
using AdapterNames = std::vector<std::optional<std::string>>;

// How a model is opened.
struct Options {
    // "onnxruntime" or "tensorrt"; empty: TensorRT where the folder holds an engine and this program was built for it.
    std::string backend;
    // ONNX Runtime: a native library with the op; empty: the op's definition inside the model runs.
    std::filesystem::path op_library;
    // ONNX Runtime: threads of one request; 0: one for each core that the process may use.
    int threads = 0;
    // TensorRT: which engine in `engines/`; empty: the only one.
    std::string engine;
    // TensorRT: how many requests are on the GPU at once, each with a KV cache and activations; more wait.
    int streams = 2;
    // Of a model with a shelf: a request whose adapters find no slot ends with an Error after so many seconds in which
    // none of those that hold the slots goes on. More than the longest call takes: one may be in the middle of it.
    int patience = 300;
    // Compare the files with their hashes in deploy.json first.
    bool check_files = true;
};

// Called with (row of the batch, token) as soon as a token is known; false ends that row after it.
using OnToken = std::function<bool(std::size_t row, std::int64_t token)>;

class Runner {
public:
    // Opens the model in `folder`. Throws an Error when a file is missing or another, or the back end refuses it.
    explicit Runner(const std::filesystem::path& folder, const Options& options = {});
    ~Runner();
    Runner(Runner&&) noexcept;
    Runner& operator=(Runner&&) noexcept;

    bool generates() const;
    // The name of the back end and of what it runs.
    std::string description() const;

    // Up to `count` tokens after each prompt, greedily, until a stop token, which is left out. Prompts of different
    // length make one batch, unless the model takes no padding. An answer also ends where the model has no room for
    // more. Throws an Error for an empty prompt, an unknown token, a prompt that the model is too short for, or an
    // adapter that is not on the shelf.
    //
    // A row keeps the adapter that its name stood for when it was asked, also where that is replaced or removed
    // meanwhile. The call waits while others are at work with as many adapters as there are slots, and makes several
    // batches of rows that have more of them; so an `on_token` that asks the Runner itself may wait for its own call,
    // until `Options::patience` ends.
    std::vector<Tokens> generate(const std::vector<Tokens>& prompts, std::size_t count = 64,
                                 const OnToken& on_token = {}, const AdapterNames& adapters = {}) const;

    // Tasks other than generation: a row for each input. Sentence embeddings [hidden], class logits [classes], or
    // hidden states [tokens x hidden], padding included.
    std::vector<std::vector<float>> encode(const std::vector<Tokens>& inputs, const AdapterNames& adapters = {}) const;

    // What is on the model's shelf by now; none where it has one adapter of its own. Deployments' shelves are changed
    // by `teamlora-export adapters publish`, while they serve.
    std::vector<std::string> adapters() const;

private:
    // The adapters of `count` rows.
    std::vector<std::shared_ptr<const Shelved>> find(const AdapterNames& adapters, std::size_t count) const;
    // Prompts of one batch, for whose rows `slots` are held.
    std::vector<Tokens> generate_batch(const std::vector<Tokens>& prompts, std::size_t count, const OnToken& on_token,
                                       const std::vector<std::int32_t>& slots) const;
    void check(const std::vector<Tokens>& rows) const;
    std::size_t room(std::size_t width, std::size_t count) const;

    std::unique_ptr<const Folder> folder_;
    std::unique_ptr<const Backend> backend_;
};

}  // namespace teamlora
