#include "projection.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace teamlora::cpu {
namespace {

constexpr size_t kLine = 64;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// Each alone, so that what reads beyond its end is found.
void* take_pages(size_t bytes) {
    void* const memory = std::aligned_alloc(kLine, round_up(bytes, kLine));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void give_pages(void* memory) noexcept { std::free(memory); }
#else
namespace {

constexpr size_t kPage = 2 << 20;

// Pieces one behind the other, which come back in any order.
struct Block {
    unsigned char* begin;
    size_t size, used, pieces;
};

std::mutex& lock() {
    static auto* const mutex = new std::mutex;
    return *mutex;
}

// Neither is ever destroyed: sessions may end after the library's own statics.
std::list<Block>& blocks() {
    static auto* const all = new std::list<Block>;
    return *all;
}

}  // namespace

void* take_pages(size_t bytes) {
    const size_t wanted = round_up(std::max<size_t>(bytes, 1), kLine);
    const std::lock_guard<std::mutex> guard(lock());
    std::list<Block>& all = blocks();
    auto found = std::find_if(all.begin(), all.end(), [&](const Block& b) { return b.size - b.used >= wanted; });
    if (found == all.end()) {
        const size_t size = round_up(wanted, kPage);
        void* const memory = std::aligned_alloc(kPage, size);
        if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        // Where the system has none, its own pages serve.
        static_cast<void>(madvise(memory, size, MADV_HUGEPAGE));
#endif
        all.push_front({static_cast<unsigned char*>(memory), size, 0, 0});
        found = all.begin();
    }
    void* const piece = found->begin + found->used;
    found->used += wanted;
    ++found->pieces;
    return piece;
}

void give_pages(void* memory) noexcept {
    const std::lock_guard<std::mutex> guard(lock());
    std::list<Block>& all = blocks();
    const auto* piece = static_cast<const unsigned char*>(memory);
    const auto found = std::find_if(all.begin(), all.end(),
                                    [&](const Block& b) { return !(piece < b.begin) && piece < b.begin + b.size; });
    if (found == all.end() || --found->pieces > 0) return;
    std::free(found->begin);
    all.erase(found);
}
#endif

}  // namespace teamlora::cpu
