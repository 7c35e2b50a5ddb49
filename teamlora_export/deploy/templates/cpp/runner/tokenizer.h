// Words to tokens and back, by the tokenizer of onnxruntime-genai, which reads the model's tokenizer.json.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

#include "runner.h"

namespace teamlora {

// May be used by many threads at once: they take turns.
class Tokenizer {
public:
    // Throws an Error where the folder has no tokenizer, or the program was built without onnxruntime-genai.
    explicit Tokenizer(const std::filesystem::path& folder);
    ~Tokenizer();

    Tokens encode(const std::string& text) const;
    std::string decode(const Tokens& tokens) const;

private:
    struct Library;
    std::unique_ptr<Library> library_;
    mutable std::mutex mutex_;
};

// Turns tokens into text piece by piece: a piece ends where a character does. For one row of one request.
class TextStream {
public:
    explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    // What `token` adds to the text; nothing while a character is not complete.
    std::string add(std::int64_t token);

private:
    const Tokenizer& tokenizer_;
    Tokens tokens_;
    std::size_t shown_ = 0;
};

}  // namespace teamlora
