// Prints the areas that are full, of the system whose files are in the folder that is given. Without one: of 64 MB that
// are written here, how many come to lie in pages of 2 MB.
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
    for (std::string name; lines >> name;) {
        int size = 0;
        if (name == "AnonHugePages:" && lines >> size) return size / 1024;
    }
    return -1;
}

}  // namespace

int main(int count, char** words) {
    if (count > 1) {
        for (const teamlora::Area& area : teamlora::full_areas(words[1])) {
            std::cout << std::hex << area.start << '-' << area.end << '\n';
        }
        return 0;
    }
    const std::vector<char> written(64 << 20, 1);
    const int before = large_megabytes();
    // One that ends at once leaves off where it is.
    { const teamlora::LargePages ended; }
    const teamlora::LargePages pages;
    for (int tries = 0; tries < 1000 && large_megabytes() < before + 60; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    std::cout << large_megabytes() - before << '\n';
}
