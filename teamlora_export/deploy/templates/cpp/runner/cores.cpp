// A limit of processor time (a cgroup's quota) does not show in the processors that may be used. With the time of one
// processor and a thread on each of 64, all 64 are stopped for most of every period, and all wait for each other.
#include "cores.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace teamlora {
namespace {

namespace fs = std::filesystem;

// Microseconds, where a group names none.
constexpr long long kPeriod = 100'000;
constexpr long long kMostCores = 1 << 20;

#ifdef __linux__
// The processors of one core, as the system writes them; the processor alone where it does not say.
std::string core_of(int processor, const fs::path& root) {
    const std::string number = std::to_string(processor);
    std::string siblings;
    std::ifstream(root / "sys/devices/system/cpu" / ("cpu" + number) / "topology/thread_siblings_list") >> siblings;
    return siblings.empty() ? number : siblings;
}
#endif

// As many cores as "QUOTA PERIOD" fills; quotas of "max" and -1 are none.
std::optional<int> cores_of(std::istream&& text) {
    long long quota = 0, period = 0;
    if (!(text >> quota) || quota <= 0) return {};
    if (!(text >> period) || period <= 0) period = kPeriod;
    return static_cast<int>(std::min(quota / period + (quota % period != 0), kMostCores));
}

// The limit of one group, as version 2 writes it, or as version 1 does.
std::optional<int> quota_of(const fs::path& group) {
    std::string quota, period;
    std::ifstream(group / "cpu.cfs_quota_us") >> quota;
    std::ifstream(group / "cpu.cfs_period_us") >> period;
    const std::optional<int> newer = cores_of(std::ifstream(group / "cpu.max"));
    return newer ? newer : cores_of(std::istringstream(quota + " " + period));
}

// Lowers `least` to the limits of the group at `path` and of those around it. A container may see its own group as the
// outermost, whatever its path is outside, and another's by a path that leads out of it.
void lower(std::optional<int>& least, const fs::path& mount, const std::string& path) {
    std::vector<fs::path> groups{mount};
    std::string name;
    for (std::istringstream names(path); std::getline(names, name, '/');) {
        if (name == "..") {
            groups.resize(1);
            break;
        }
        if (!name.empty()) groups.push_back(groups.back() / name);
    }
    for (const fs::path& group : groups) {
        const std::optional<int> quota = quota_of(group);
        if (quota && (!least || *quota < *least)) least = quota;
    }
}

bool limits_time(const std::string& controllers) {
    std::string name;
    for (std::istringstream names(controllers); std::getline(names, name, ',');) {
        if (name == "cpu") return true;
    }
    return false;
}

}  // namespace

std::optional<int> cores_of_quota(const fs::path& root) {
    const fs::path mounts = root / "sys/fs/cgroup";
    std::optional<int> least;
    std::ifstream lines(root / "proc/self/cgroup");
    for (std::string line, number, controllers, path; std::getline(lines, line);) {
        // NUMBER:CONTROLLERS:PATH, without controllers in version 2.
        std::istringstream parts(line);
        if (!std::getline(parts, number, ':') || !std::getline(parts, controllers, ':')) continue;
        if (!std::getline(parts, path)) continue;
        if (controllers.empty()) {
            lower(least, mounts, path);
        } else if (limits_time(controllers)) {
            lower(least, mounts / controllers, path);
            lower(least, mounts / "cpu", path);
        }
    }
    return least;
}

int usable_cores(const fs::path& root) {
    int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> distinct;
        for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
            if (CPU_ISSET(processor, &allowed)) distinct.insert(core_of(processor, root));
        }
        cores = std::max(1, static_cast<int>(distinct.size()));
    }
#endif
    return std::min(cores, cores_of_quota(root).value_or(cores));
}

}  // namespace teamlora
