// Prints how many threads the project starts where nothing is said, and how many cores the quota fills (0: there is
// none); of the system whose files are in the folder that is given.
#include <iostream>

#include "runner/cores.h"

int main(int count, char** words) {
    const std::filesystem::path root = count > 1 ? words[1] : "/";
    std::cout << teamlora::usable_cores(root) << ' ' << teamlora::cores_of_quota(root).value_or(0) << '\n';
}
