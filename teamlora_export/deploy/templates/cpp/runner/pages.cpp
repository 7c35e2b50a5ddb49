// A step of decoding reads every weight once, and for each page of memory the processor looks up where it lies. Linux
// gives out pages of 4 kB, the most scattered ones first, unless it is asked for larger ones: so the earlier a model is
// opened, the slower it is. In large pages, of 2 MB, each is faster than the last of them.
#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>
#endif

namespace teamlora {

#ifdef __linux__
namespace {

namespace fs = std::filesystem;

constexpr const char* kSettings = "sys/kernel/mm/transparent_hugepage";
// As much as is looked at, and moved, at once: a program that ends waits for no more.
constexpr std::uintptr_t kPiece = 64 << 20;
// Of an area that can be full, over all that the process has in memory. Some reserve a thousand times as much.
constexpr std::uintptr_t kMost = 4;
// Of a large page, in memory before it is made one, in tenths.
constexpr std::uintptr_t kFull = 9;
// Of a page, in the process's table of them: it is in memory, and no other process shares it.
constexpr std::uint64_t kOwnAndPresent = std::uint64_t{1} << 63 | std::uint64_t{1} << 56;
// To move memory into large pages now, as Linux numbers it since 6.1; headers may not know it.
constexpr int kCollapse = 25;

// Bytes of a large page; 0 where there are none.
std::uintptr_t large_of(const fs::path& root) {
    std::uintptr_t large = 0;
    std::ifstream(root / kSettings / "hpage_pmd_size") >> large;
    return large;
}

std::uintptr_t small_page() { return static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)); }

bool is_full(const std::uint64_t* pages, std::uintptr_t count) {
    const auto own = std::count_if(pages, pages + count,
                                   [](std::uint64_t page) { return (page & kOwnAndPresent) == kOwnAndPresent; });
    return static_cast<std::uintptr_t>(own) * 10 >= count * kFull;
}

}  // namespace

bool has_large_pages(const fs::path& root) {
    std::ifstream file(root / kSettings / "enabled");
    const std::string setting{std::istreambuf_iterator<char>(file), {}};
    const bool given = setting.find("[madvise]") != std::string::npos || setting.find("[always]") != std::string::npos;
    const std::uintptr_t large = large_of(root);
    return given && small_page() < large && large <= kPiece && madvise(nullptr, 0, kCollapse) == 0;
}

void find_full_areas(const std::function<bool(std::uintptr_t, std::uintptr_t)>& take, const fs::path& root) {
    const std::uintptr_t large = large_of(root), small = small_page();
    if (large == 0) return;
    std::uintptr_t most = 0;
    std::ifstream(root / "proc/self/statm") >> most >> most;
    std::ifstream lines(root / "proc/self/maps"), pagemap;
    // A buffer's odd length would be refused.
    pagemap.rdbuf()->pubsetbuf(nullptr, 0);
    pagemap.open(root / "proc/self/pagemap", std::ios::binary);
    std::vector<std::uint64_t> pages(kPiece / small);
    const std::uintptr_t of_large = large / small;
    for (std::string line, permissions, offset, device, inode; std::getline(lines, line);) {
        // START-END PERMISSIONS OFFSET DEVICE INODE [PATH]; an inode is a file's.
        std::uintptr_t start = 0, end = 0;
        char dash = 0;
        std::istringstream words(line);
        words >> std::hex >> start >> dash >> end >> permissions >> offset >> device >> inode;
        if (permissions != "rw-p" || inode != "0" || end - start > kMost * small * most) continue;
        const std::uintptr_t beyond = end / large * large;
        for (std::uintptr_t piece = (start + large - 1) / large * large; piece < beyond; piece += kPiece) {
            const std::uintptr_t count = (std::min(piece + kPiece, beyond) - piece) / large;
            pagemap.seekg(static_cast<std::streamoff>(piece / small * sizeof(std::uint64_t)));
            pagemap.read(reinterpret_cast<char*>(pages.data()),
                         static_cast<std::streamsize>(count * of_large * sizeof(std::uint64_t)));
            if (!pagemap) return;
            for (std::uintptr_t first = 0; first < count;) {
                std::uintptr_t last = first;
                while (last < count && is_full(&pages[last * of_large], of_large)) ++last;
                if (last > first && !take(piece + first * large, piece + last * large)) return;
                first = last + 1;
            }
        }
    }
}

PageSweep::PageSweep() {
    if (!has_large_pages()) return;
    const auto sweep = [this] {
        try {
            find_full_areas([this](std::uintptr_t start, std::uintptr_t end) {
                const bool moved = madvise(reinterpret_cast<void*>(start), end - start, kCollapse) == 0;
                return !stopped_ && (moved || (errno != ENOMEM && errno != EBUSY));
            });
        } catch (const std::exception&) {
            // No memory is left to look at memory with.
        }
    };
    try {
        thread_ = std::thread(sweep);
    } catch (const std::system_error&) {
        // No thread is left, and none is needed.
    }
}
#else
bool has_large_pages(const std::filesystem::path&) { return false; }

void find_full_areas(const std::function<bool(std::uintptr_t, std::uintptr_t)>&, const std::filesystem::path&) {}

PageSweep::PageSweep() = default;
#endif

PageSweep::~PageSweep() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
}

}  // namespace teamlora
