#pragma once

#include <functional>
#include <vector>

namespace emulated {

using Work = std::vector<std::function<void()>>;

bool is_recording();
// Runs the task, or records it while this thread captures.
void enqueue(std::function<void()> task);

}  // namespace emulated
