#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

namespace emulated {

using Work = std::vector<std::function<void()>>;

bool is_recording();
// Runs the task behind what is in the stream, or records it while this thread captures.
void enqueue(cudaStream_t stream, std::function<void()> task);

}  // namespace emulated
