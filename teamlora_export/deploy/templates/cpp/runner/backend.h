// What runs the model. runner.cpp decides which tokens go in; a back end runs them and keeps the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "adapters.h"
#include "folder.h"
#include "runner.h"

namespace teamlora {

// A prompt is read in parts of so many tokens, which bounds the memory that it takes.
inline constexpr std::size_t kPart = 512;

// The KV cache of one request; used by one thread.
class Decoder {
public:
    virtual ~Decoder() = default;
    // A call has so many tokens at most: longer prompts are read in parts.
    virtual std::size_t part() const { return std::numeric_limits<std::size_t>::max(); }
    // Runs the next tokens: ids and positions [batch, tokens], mask [batch, tokens so far]. Returns the logits of the
    // last one, [batch, vocabulary], valid until the next call.
    virtual const std::vector<float>& run(const Tokens& ids, const Tokens& mask, const Tokens& positions) = 0;
};

// An opened model; used by many threads.
class Backend {
public:
    virtual ~Backend() = default;
    virtual std::string description() const = 0;
    // Those that rows can have; null: the model has one of its own.
    virtual Adapters* adapters() const { return nullptr; }
    // A request of `batch` prompts, at most `most` tokens each, answer included. `slots`: of its rows, which are held
    // for as long as the decoder is there.
    virtual std::unique_ptr<Decoder> start(std::size_t batch, std::size_t most, const Slots& slots = {}) const = 0;
    // Runs a model without a cache: ids and mask [batch, tokens]. Returns the output, batch first.
    virtual std::vector<float> encode(const Tokens& ids, const Tokens& mask, std::size_t batch,
                                      const Slots& slots = {}) const = 0;
};

#ifdef TEAMLORA_ONNXRUNTIME
std::unique_ptr<Backend> open_onnxruntime(const Folder& folder, const Options& options);
#endif
#ifdef TEAMLORA_TENSORRT
std::unique_ptr<Backend> open_tensorrt(const Folder& folder, const Options& options);
#endif

// Where the key and value of a cache output come in again: present.3.key -> past_key_values.3.key.
std::string past_name(const std::string& present);
bool is_past(const std::string& name);
bool is_present(const std::string& name);
// The outputs that hold a result, the best one first: a model may have several.
inline constexpr const char* kResults[] = {"sentence_embedding", "logits", "last_hidden_state"};

}  // namespace teamlora
