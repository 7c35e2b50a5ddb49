// How many threads are worth starting.
#pragma once

#include <filesystem>
#include <optional>

namespace teamlora {

// Processor cores that this process may use, no more than its quota of time fills; two threads of one core count once.
// `root`: of the system's files.
int usable_cores(const std::filesystem::path& root = "/");

// How many cores the processor time fills that this process may take, rounded up; nothing where there is no limit. The
// groups around a process's own limit it too. Both versions of cgroups are read where they usually lie.
std::optional<int> cores_of_quota(const std::filesystem::path& root = "/");

}  // namespace teamlora
