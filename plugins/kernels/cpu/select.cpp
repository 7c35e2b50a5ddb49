#include "code.h"

namespace teamlora::cpu {

namespace portable {
extern const Code kCode;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Code kCode;
}
namespace avx512 {
extern const Code kCode;
}
#elif defined(__aarch64__)
namespace neon {
extern const Code kCode;
}
#endif

namespace {

std::vector<const Code*> find_codes() {
    std::vector<const Code*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&avx512::kCode);
    if (avx2) found.push_back(&avx2::kCode);
#elif defined(__aarch64__)
    // Every 64-bit ARM processor has it.
    found.push_back(&neon::kCode);
#endif
    found.push_back(&portable::kCode);
    return found;
}

}  // namespace

const std::vector<const Code*>& available_codes() {
    static const std::vector<const Code*> codes = find_codes();
    return codes;
}

}  // namespace teamlora::cpu
