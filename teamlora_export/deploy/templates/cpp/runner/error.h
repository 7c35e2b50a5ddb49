#pragma once

#include <stdexcept>

namespace teamlora {

// The one exception that is thrown here; its message is for people.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace teamlora
