// A step of decoding reads every weight once, and for each page of memory the processor looks up where it lies. Linux
// gives out pages of 4 kB, the most scattered ones first, unless it is asked for larger ones: so the earlier a model is
// opened, the slower it is. In large pages, of 2 MB, each is faster than the last of them.
#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>

namespace teamlora {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLargePages = "sys/kernel/mm/transparent_hugepage";

#ifdef __linux__
// Of a large page in memory, before it is made one, in tenths.
constexpr std::size_t kFull = 9;
constexpr unsigned kPresent = 63;
// A program that ends waits for no more.
constexpr std::uintptr_t kAtOnce = 64 << 20;
// As Linux numbers it since 6.1, which headers may not know: to do it now.
constexpr int kCollapse = 25;

bool are_on(const fs::path& root) {
    std::ifstream file(root / kLargePages / "enabled");
    const std::string setting{std::istreambuf_iterator<char>(file), {}};
    return setting.find("[madvise]") != std::string::npos || setting.find("[always]") != std::string::npos;
}
#endif

}  // namespace

#ifdef __linux__
std::vector<Area> full_areas(const fs::path& root) {
    std::size_t large = 0;
    std::ifstream(root / kLargePages / "hpage_pmd_size") >> large;
    const auto small = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    if (large < small) return {};
    std::vector<Area> areas;
    std::vector<std::uint64_t> entries(large / small);
    std::ifstream lines(root / "proc/self/maps"), pagemap;
    // A buffer's odd length would be refused.
    pagemap.rdbuf()->pubsetbuf(nullptr, 0);
    pagemap.open(root / "proc/self/pagemap", std::ios::binary);
    for (std::string line, permissions, offset, device, inode; std::getline(lines, line);) {
        // START-END PERMISSIONS OFFSET DEVICE INODE [PATH]; an inode is a file's.
        std::uintptr_t start = 0, end = 0;
        char dash = 0;
        std::istringstream words(line);
        words >> std::hex >> start >> dash >> end >> permissions >> offset >> device >> inode;
        if (permissions != "rw-p" || inode != "0") continue;
        for (start = (start + large - 1) / large * large; start + large <= end; start += large) {
            pagemap.seekg(static_cast<std::streamoff>(start / small * sizeof(std::uint64_t)));
            pagemap.read(reinterpret_cast<char*>(entries.data()),
                         static_cast<std::streamsize>(entries.size() * sizeof(std::uint64_t)));
            if (!pagemap) return areas;
            const auto present = static_cast<std::size_t>(
                std::count_if(entries.begin(), entries.end(), [](std::uint64_t entry) { return entry >> kPresent; }));
            if (present * 10 < entries.size() * kFull) continue;
            if (areas.empty() || areas.back().end != start) areas.push_back({start, start});
            areas.back().end = start + large;
        }
    }
    return areas;
}

LargePages::LargePages(const fs::path& root) {
    if (!are_on(root)) return;
    thread_ = std::thread([this, root] {
        for (const auto [start, end] : full_areas(root)) {
            for (std::uintptr_t at = start; at < end && !stopped_; at += kAtOnce) {
                // The first is for the system to do in its own time, which is all that those before 6.1 know.
                for (const int advice : {MADV_HUGEPAGE, kCollapse}) {
                    madvise(reinterpret_cast<void*>(at), std::min(kAtOnce, end - at), advice);
                }
            }
        }
    });
}
#else
std::vector<Area> full_areas(const fs::path&) { return {}; }

LargePages::LargePages(const fs::path&) {}
#endif

LargePages::~LargePages() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
}

}  // namespace teamlora
