// Prints how many threads the project starts where nothing is said.
#include <iostream>

#include "runner/cores.h"

int main() { std::cout << teamlora::usable_cores() << '\n'; }
