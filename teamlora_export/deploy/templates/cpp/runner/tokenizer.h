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

    // With the special tokens that the model's texts have around them. Throws an Error for what is no text in UTF-8.
    Tokens encode(const std::string& text) const;
    std::string decode(const Tokens& tokens) const;

private:
    friend class TextStream;
    struct Library;
    std::unique_ptr<Library> library_;
    mutable std::mutex mutex_;
};

// Turns tokens into text piece by piece: a piece ends where a character does. For one row of one request.
class TextStream {
public:
    explicit TextStream(const Tokenizer& tokenizer);
    ~TextStream();
    // What `token` adds to the text; nothing while a character is not complete.
    std::string add(std::int64_t token);

private:
    struct Library;
    const Tokenizer& tokenizer_;
    std::unique_ptr<Library> library_;
};

}  // namespace teamlora
