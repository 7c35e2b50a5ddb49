#include "cores.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <thread>

namespace teamlora {
namespace {

#ifdef __linux__
// The processors of one core, as the system writes them; the processor alone where it does not say.
std::string core_of(int processor) {
    const std::string number = std::to_string(processor);
    std::string siblings;
    std::ifstream("/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list") >> siblings;
    return siblings.empty() ? number : siblings;
}
#endif

}  // namespace

int usable_cores() {
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> cores;
        for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
            if (CPU_ISSET(processor, &allowed)) cores.insert(core_of(processor));
        }
        return static_cast<int>(cores.size());
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace teamlora
