#include "tokenizer.h"

#include <algorithm>
#include <utility>

#ifndef TEAMLORA_TOKENIZER

namespace teamlora {

struct Tokenizer::Library {};
struct TextStream::Library {};

Tokenizer::Tokenizer(const std::filesystem::path&) {
    throw Error(
        "This program was built without a tokenizer. Install onnxruntime-genai and build it again, or give token ids.");
}
Tokenizer::~Tokenizer() = default;
Tokens Tokenizer::encode(const std::string&) const { return {}; }
std::string Tokenizer::decode(const Tokens&) const { return ""; }
TextStream::TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
TextStream::~TextStream() = default;
std::string TextStream::add(std::int64_t) { return ""; }

}  // namespace teamlora

#else

// What is used of onnxruntime-genai's C interface. Declared here, since its Python package has the library without a
// header.
extern "C" {
struct OgaResult;
struct OgaConfig;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyResult(OgaResult*);
OgaResult* OgaCreateConfig(const char* folder, OgaConfig**);
void OgaDestroyConfig(OgaConfig*);
OgaResult* OgaCreateTokenizerFromConfig(const OgaConfig*, OgaTokenizer**);
void OgaDestroyTokenizer(OgaTokenizer*);
OgaResult* OgaCreateSequences(OgaSequences**);
void OgaDestroySequences(OgaSequences*);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
std::size_t OgaSequencesGetSequenceCount(const OgaSequences*, std::size_t index);
const std::int32_t* OgaSequencesGetSequenceData(const OgaSequences*, std::size_t index);
OgaResult* OgaUpdateTokenizerOptions(OgaTokenizer*, const char* const* names, const char* const* values, std::size_t);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, std::int32_t token, const char** text);
void OgaShutdown();
}

namespace teamlora {
namespace {

void check(OgaResult* result, const std::string& what) {
    if (result == nullptr) return;
    const std::string message = OgaResultGetError(result);
    OgaDestroyResult(result);
    throw Error(what + ": " + message.substr(0, std::min<std::size_t>(message.find('\n'), 300)));
}

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

template <typename T, typename Create>
Handle<T> create(void (*destroy)(T*), const std::string& what, Create make) {
    T* made = nullptr;
    check(make(&made), what);
    return {made, destroy};
}

// Whole characters, none of them 0, which would end the text early: the library takes whatever it is given.
bool is_utf8(const std::string& text) {
    std::size_t missing = 0;
    unsigned least = 0, character = 0;
    for (const char byte : text) {
        const auto bits = static_cast<unsigned char>(byte);
        if (missing > 0) {
            if ((bits & 0xC0) != 0x80) return false;
            character = character << 6 | (bits & 0x3Fu);
            const bool surrogate = character >= 0xD800 && character < 0xE000;
            if (--missing == 0 && (character < least || character > 0x10FFFF || surrogate)) return false;
        } else if (bits >= 0x80) {
            missing = bits >= 0xF0 ? 3 : bits >= 0xE0 ? 2 : 1;
            if (bits < 0xC0 || bits >= 0xF8) return false;
            character = bits & (0x3Fu >> missing);
            least = missing == 3 ? 0x10000 : missing == 2 ? 0x800 : 0x80;
        } else if (bits == 0) {
            return false;
        }
    }
    return missing == 0;
}

// The library wants to be told when nobody uses it any more, before the program's own end.
std::shared_ptr<void> library_in_use() {
    static std::mutex mutex;
    static std::weak_ptr<void> shared;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<void> use = shared.lock();
    if (!use) {
        use = std::shared_ptr<void>(&mutex, [](void*) { OgaShutdown(); });
        shared = use;
    }
    return use;
}

}  // namespace

struct Tokenizer::Library {
    std::shared_ptr<void> in_use = library_in_use();
    Handle<OgaTokenizer> tokenizer{nullptr, OgaDestroyTokenizer};
};

Tokenizer::Tokenizer(const std::filesystem::path& folder) : library_(std::make_unique<Library>()) {
    const std::string where = (folder / "tokenizer.json").string();
    for (const char* needed : {"tokenizer.json", "genai_config.json"}) {
        if (std::filesystem::is_regular_file(folder / needed)) continue;
        throw Error((folder / needed).string() + ": is missing, so words cannot be read. Give token ids.");
    }
    const auto config = create<OgaConfig>(OgaDestroyConfig, where,
                                          [&](OgaConfig** made) { return OgaCreateConfig(folder.c_str(), made); });
    library_->tokenizer = create<OgaTokenizer>(OgaDestroyTokenizer, where, [&](OgaTokenizer** made) {
        return OgaCreateTokenizerFromConfig(config.get(), made);
    });
    // It leaves them out unless it is told.
    const char* const name = "add_special_tokens";
    const char* const value = "true";
    check(OgaUpdateTokenizerOptions(library_->tokenizer.get(), &name, &value, 1), where);
}

Tokenizer::~Tokenizer() = default;

Tokens Tokenizer::encode(const std::string& text) const {
    if (!is_utf8(text)) throw Error("A prompt is not text in UTF-8.");
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto sequences = create<OgaSequences>(OgaDestroySequences, "The tokenizer", OgaCreateSequences);
    check(OgaTokenizerEncode(library_->tokenizer.get(), text.c_str(), sequences.get()), "The tokenizer");
    const std::int32_t* data = OgaSequencesGetSequenceData(sequences.get(), 0);
    return {data, data + OgaSequencesGetSequenceCount(sequences.get(), 0)};
}

// Piece by piece: decoding all at once stops at the first byte that belongs to no character.
std::string Tokenizer::decode(const Tokens& tokens) const {
    TextStream stream(*this);
    std::string text;
    for (const std::int64_t token : tokens) text += stream.add(token);
    return text;
}

struct TextStream::Library {
    Handle<OgaTokenizerStream> stream{nullptr, OgaDestroyTokenizerStream};
};

TextStream::TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer), library_(std::make_unique<Library>()) {
    const std::lock_guard<std::mutex> lock(tokenizer_.mutex_);
    library_->stream =
        create<OgaTokenizerStream>(OgaDestroyTokenizerStream, "The tokenizer", [&](OgaTokenizerStream** made) {
            return OgaCreateTokenizerStream(tokenizer_.library_->tokenizer.get(), made);
        });
}

TextStream::~TextStream() = default;

std::string TextStream::add(std::int64_t token) {
    const std::lock_guard<std::mutex> lock(tokenizer_.mutex_);
    const char* text = nullptr;
    check(OgaTokenizerStreamDecode(library_->stream.get(), static_cast<std::int32_t>(token), &text), "The tokenizer");
    return text;
}

}  // namespace teamlora

#endif
