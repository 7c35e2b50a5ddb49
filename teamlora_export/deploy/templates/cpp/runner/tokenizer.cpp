#include "tokenizer.h"

#include <string_view>
#include <utility>

namespace teamlora {

std::string TextStream::add(std::int64_t token) {
    tokens_.push_back(token);
    const std::string text = tokenizer_.decode(tokens_);
    constexpr std::string_view kIncomplete = "\xEF\xBF\xBD";
    if (text.size() < shown_ ||
        (text.size() >= kIncomplete.size() && text.compare(text.size() - 3, 3, kIncomplete) == 0)) {
        return "";
    }
    return text.substr(std::exchange(shown_, text.size()));
}

}  // namespace teamlora

#ifndef TEAMLORA_TOKENIZER

namespace teamlora {

struct Tokenizer::Library {};

Tokenizer::Tokenizer(const std::filesystem::path&) {
    throw Error(
        "This program was built without a tokenizer. Install onnxruntime-genai and build it again, or give token ids.");
}
Tokenizer::~Tokenizer() = default;
Tokens Tokenizer::encode(const std::string&) const { return {}; }
std::string Tokenizer::decode(const Tokens&) const { return ""; }

}  // namespace teamlora

#else

// What is used of onnxruntime-genai's C interface. Declared here, since its Python package has the library without a
// header.
extern "C" {
struct OgaResult;
struct OgaConfig;
struct OgaTokenizer;
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
OgaResult* OgaTokenizerDecode(const OgaTokenizer*, const std::int32_t*, std::size_t, const char** text);
void OgaDestroyString(const char*);
void OgaShutdown();
}

namespace teamlora {
namespace {

void check(OgaResult* result, const std::string& what) {
    if (result == nullptr) return;
    const std::string message = OgaResultGetError(result);
    OgaDestroyResult(result);
    throw Error(what + ": " + message);
}

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

template <typename T, typename Create>
Handle<T> create(void (*destroy)(T*), const std::string& what, Create make) {
    T* made = nullptr;
    check(make(&made), what);
    return {made, destroy};
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
}

Tokenizer::~Tokenizer() = default;

Tokens Tokenizer::encode(const std::string& text) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto sequences = create<OgaSequences>(OgaDestroySequences, "The tokenizer", OgaCreateSequences);
    check(OgaTokenizerEncode(library_->tokenizer.get(), text.c_str(), sequences.get()), "The tokenizer");
    const std::int32_t* data = OgaSequencesGetSequenceData(sequences.get(), 0);
    return {data, data + OgaSequencesGetSequenceCount(sequences.get(), 0)};
}

std::string Tokenizer::decode(const Tokens& tokens) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<std::int32_t> narrow(tokens.begin(), tokens.end());
    const char* text = nullptr;
    check(OgaTokenizerDecode(library_->tokenizer.get(), narrow.data(), narrow.size(), &text), "The tokenizer");
    const std::unique_ptr<const char, void (*)(const char*)> owner(text, OgaDestroyString);
    return text;
}

}  // namespace teamlora

#endif
