// Larger pages of memory for a model's weights.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <thread>
#include <vector>

namespace teamlora {

struct Area {
    std::uintptr_t start, end;
};

// Where memory lies that is this process's alone and is in use nearly everywhere, from large page to large page; nothing
// where the system does not tell. Of a thread's stack, for one, hardly anything is in use: a large page would take what
// it does not. `root`: of the system's files.
std::vector<Area> full_areas(const std::filesystem::path& root = "/");

// Lays the memory that this process has when it is made in large pages, of 2 MB, wherever that takes hardly any more of
// it. That takes a thread of its own 0.2 to 3 s for 1 GB, by how much the system has to move. Nothing is done where the
// system's owner has turned large pages off, or where there are none: they are a matter of speed alone.
class LargePages {
public:
    explicit LargePages(const std::filesystem::path& root = "/");
    ~LargePages();

private:
    std::atomic<bool> stopped_{false};
    std::thread thread_;
};

}  // namespace teamlora
