// What the TensorRT back end owns on the GPU, each freed by its destructor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "error.h"

namespace teamlora {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw Error(std::string(what) + ": " + cudaGetErrorString(status) + ".");
}

class Stream {
public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "A CUDA stream cannot be made"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t get() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_), "The GPU failed"); }

private:
    cudaStream_t stream_ = nullptr;
};

// Device memory that grows and never shrinks.
class DeviceBuffer {
public:
    DeviceBuffer() = default;
    ~DeviceBuffer() { cudaFree(data_); }
    DeviceBuffer(DeviceBuffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    // At least `size` bytes, of any content. True: the address is another, the content lost.
    bool reserve(std::size_t size) {
        if (size <= size_) return false;
        cudaFree(std::exchange(data_, nullptr));
        size_ = 0;
        check(cudaMalloc(&data_, size), "No memory on the GPU");
        size_ = size;
        return true;
    }

    void* get() const { return data_; }
    std::size_t size() const { return size_; }

private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

// Work that was recorded once, to be launched again with the same addresses and shapes.
class Graph {
public:
    Graph() = default;
    ~Graph() { clear(); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    explicit operator bool() const { return graph_ != nullptr; }

    void clear() {
        if (graph_ != nullptr) cudaGraphExecDestroy(std::exchange(graph_, nullptr));
    }

    // Records what `enqueue` puts into the stream, without running it. False: it cannot be recorded.
    template <typename Enqueue>
    bool record(const Stream& stream, Enqueue enqueue) {
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "The GPU failed");
        const bool enqueued = enqueue();
        cudaGraph_t recorded = nullptr;
        bool fine = cudaStreamEndCapture(stream.get(), &recorded) == cudaSuccess && enqueued;
        fine = fine && cudaGraphInstantiate(&graph_, recorded, 0) == cudaSuccess;
        if (recorded != nullptr) cudaGraphDestroy(recorded);
        // A failed recording leaves an error behind that the next call would report as its own.
        if (!fine) cudaGetLastError();
        return fine;
    }

    void launch(const Stream& stream) const { check(cudaGraphLaunch(graph_, stream.get()), "The GPU failed"); }

private:
    cudaGraphExec_t graph_ = nullptr;
};

}  // namespace teamlora
