// SHA-256, as deploy.json lists it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace teamlora {

class Sha256 {
public:
    // Throws an Error where the system's OpenSSL does not know it.
    Sha256();
    ~Sha256();

    void add(const char* data, std::size_t size);
    // In hexadecimal digits; nothing is added afterwards.
    std::string digits();

private:
    struct Library;
    std::unique_ptr<Library> library_;
};

}  // namespace teamlora
