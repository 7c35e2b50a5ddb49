#include "hash.h"

#include <openssl/evp.h>

#include <array>

#include "error.h"

namespace teamlora {
namespace {

void require(bool fine) {
    if (!fine) throw Error("SHA-256 cannot be computed on this system.");
}

}  // namespace

struct Sha256::Library {
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context{EVP_MD_CTX_new(), EVP_MD_CTX_free};
};

Sha256::Sha256() : library_(std::make_unique<Library>()) {
    require(library_->context != nullptr && EVP_DigestInit_ex(library_->context.get(), EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::add(const char* data, std::size_t size) {
    require(EVP_DigestUpdate(library_->context.get(), data, size) == 1);
}

std::string Sha256::digits() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int size = 0;
    require(EVP_DigestFinal_ex(library_->context.get(), digest.data(), &size) == 1);
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
        constexpr char kDigits[] = "0123456789abcdef";
        text += {kDigits[digest[i] >> 4], kDigits[digest[i] & 15]};
    }
    return text;
}

}  // namespace teamlora
