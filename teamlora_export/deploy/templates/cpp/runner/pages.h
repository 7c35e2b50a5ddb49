// Larger pages of memory for a model's weights.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <thread>

namespace teamlora {

// Whether this system gives large pages to those who ask: Linux from 6.1 on, where its setting is not "never". `root`:
// of the system's files.
bool has_large_pages(const std::filesystem::path& root = "/");

// Calls `take` with where memory starts and ends that is no file's, this process's alone, and in use nearly everywhere;
// from large page to large page, in pieces, until it returns false or the system tells of no more. Of a thread's stack,
// for one, hardly anything is in use: a large page would take what it does not.
void find_full_areas(const std::function<bool(std::uintptr_t, std::uintptr_t)>& take,
                     const std::filesystem::path& root = "/");

// Moves the memory that this process has when it is made into large pages, wherever that takes hardly any more of it.
// That takes a thread of its own 0.2 to 3 s for 1 GB, by how scattered what is free lies. It leaves off where it is to
// end, and where the system has no more to give: they are a matter of speed alone.
class PageSweep {
public:
    PageSweep();
    ~PageSweep();

private:
    std::atomic<bool> stopped_{false};
    std::thread thread_;
};

}  // namespace teamlora
