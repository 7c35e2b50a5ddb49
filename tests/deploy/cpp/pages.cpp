// Prints the areas that are full, of the system whose files are in the folder that is given. Without one: whether this
// system gives large pages, and of 64 MB that are written here, how many come to lie in them.
#include <chrono>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "runner/pages.h"

namespace {

int large_megabytes() {
    std::ifstream lines("/proc/self/smaps_rollup");
    for (std::string word; lines >> word;) {
        int size = 0;
        if (word == "AnonHugePages:" && lines >> size) return size / 1024;
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    if (count > 1) {
        const auto print = [](std::uintptr_t start, std::uintptr_t end) {
            std::cout << std::hex << start << '-' << end << '\n';
            return true;
        };
        teamlora::find_full_areas(print, words[1]);
        return 0;
    }
    std::vector<char> written(64 << 20, 1);
    const teamlora::PageSweep sweep;
    const bool given = teamlora::has_large_pages();
    for (int tries = 0; given && tries < 500 && large_megabytes() < 48; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    std::cout << given << ' ' << large_megabytes() << ' ' << int{written.back()} << '\n';
}
