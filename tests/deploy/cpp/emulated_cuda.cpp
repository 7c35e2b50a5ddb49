// CUDA's runtime on the CPU, as much of it as the TensorRT back end calls. New memory holds NaN. What is enqueued runs
// at once, or is recorded while its stream is captured; but what is copied from the host arrives as late as it may:
// with the stream's next work, or when it is waited for.
#include "emulated_cuda.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

thread_local emulated::Work* recorded = nullptr;
std::atomic<std::size_t> launches{0};

struct Report {
    ~Report() { std::fprintf(stderr, "graph launches: %zu\n", launches.load()); }
} report;

// Bytes of one allocation, at most.
std::size_t largest() {
    const char* said = std::getenv("EMULATED_LARGEST");
    return said != nullptr ? std::strtoull(said, nullptr, 10) : std::numeric_limits<std::size_t>::max();
}

emulated::Work* work(void* graph) { return static_cast<emulated::Work*>(graph); }

// What is on its way into the stream, which one thread uses at a time.
emulated::Work& arriving(cudaStream_t stream) { return *reinterpret_cast<emulated::Work*>(stream); }

void finish(cudaStream_t stream) {
    for (const auto& copy : arriving(stream)) copy();
    arriving(stream).clear();
}

}  // namespace

namespace emulated {

bool is_recording() { return recorded != nullptr; }

void enqueue(cudaStream_t stream, std::function<void()> task) {
    if (recorded == nullptr) {
        finish(stream);
        task();
    } else {
        recorded->push_back(std::move(task));
    }
}

}  // namespace emulated

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
    *stream = reinterpret_cast<cudaStream_t>(new emulated::Work);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete &arriving(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    finish(stream);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t size) {
    if (size > largest()) return cudaErrorMemoryAllocation;
    *memory = std::malloc(size);
    std::memset(*memory, 0xFF, size);
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t size, cudaStream_t stream) {
    finish(stream);
    std::memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* memory, std::size_t pitch, int value, std::size_t width, std::size_t height,
                              cudaStream_t stream) {
    if (width > pitch) return cudaErrorInvalidPitchValue;
    finish(stream);
    for (std::size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(memory) + row * pitch, value, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (kind == cudaMemcpyHostToDevice) {
        const auto* bytes = static_cast<const char*>(source);
        arriving(stream).push_back([target, staged = std::vector<char>(bytes, bytes + size)] {
            std::memcpy(target, staged.data(), staged.size());
        });
        return cudaSuccess;
    }
    finish(stream);
    std::memcpy(target, source, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t stream) {
    if (width > target_pitch || width > source_pitch) return cudaErrorInvalidPitchValue;
    finish(stream);
    for (std::size_t row = 0; row < height; ++row) {
        std::memcpy(static_cast<char*>(target) + row * target_pitch,
                    static_cast<const char*>(source) + row * source_pitch, width);
    }
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    recorded = new emulated::Work;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = reinterpret_cast<cudaGraph_t>(recorded);
    recorded = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* instance, cudaGraph_t graph, unsigned long long) {
    *instance = reinterpret_cast<cudaGraphExec_t>(new emulated::Work(*work(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete work(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete work(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    finish(stream);
    for (const auto& task : *work(graph)) task();
    ++launches;
    return cudaSuccess;
}
}
