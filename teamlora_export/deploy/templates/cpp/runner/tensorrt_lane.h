// A lane of the TensorRT back end: what one request at a time uses on the GPU, and the calls of the engine in it.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.h"
#include "tensorrt_engine.h"
#include "tensorrt_slots.h"

namespace teamlora {

// Members are destroyed from the last to the first: contexts, buffers, then the stream.
struct Lane {
    Lane(const Engine& engine, const TensorRTSlots& slots)
        : prefill(engine.context(false, stream)), decode(engine.context(true, stream)) {
        slots.bind(*prefill);
        slots.bind(*decode);
    }

    Stream stream;
    // The third input is position_ids or token_type_ids.
    DeviceBuffer ids, mask, third;
    // The slot of each row, of an engine that takes adapters.
    DeviceBuffer adapter;
    // Of every output that is no cache.
    std::map<std::string, DeviceBuffer> results;
    // A buffer for each cache. One that is in place is in `past` alone.
    std::vector<DeviceBuffer> past, present;
    std::unique_ptr<Context> prefill, decode;
    // A recorded step of decoding, for this batch and these rows of a cache.
    Graph graph;
    std::size_t batch = 0, rows = 0;
};

// A few lanes; whoever finds none free waits.
class Lanes {
public:
    Lanes(const Engine& engine, const TensorRTSlots& slots, int most);
    // It comes back when its last owner lets it go.
    std::shared_ptr<Lane> take();

private:
    const Engine& engine_;
    const TensorRTSlots& slots_;
    int most_, made_ = 0;
    std::mutex mutex_;
    std::condition_variable free_again_;
    std::vector<std::unique_ptr<Lane>> free_;
};

// One call of the engine in a lane.
class Call {
public:
    Call(const Engine& engine, Lane& lane, Context& context) : engine_(engine), lane_(lane), context_(context) {}

    // Shapes of a call with ids [batch, tokens], a mask [batch, total] and caches of `past` rows.
    void set_shapes(std::size_t batch, std::size_t tokens, std::size_t past, std::size_t total);
    // Binds all but the caches and the slots. True: a result has another address than before, and a step that was
    // recorded with that is dropped.
    bool bind();
    // `past` and `present` hold a buffer for each cache, in the order of the inputs `caches`; they may be the same.
    void bind_cache(const std::vector<Tensor>& caches, const std::vector<DeviceBuffer>& past,
                    const std::vector<DeviceBuffer>& present);
    // False: the engine's last_error() says why.
    bool enqueue() { return context_.enqueue(lane_.stream); }
    void enqueue_or_throw();

private:
    const Engine& engine_;
    Lane& lane_;
    Context& context_;
};

template <typename T>
void upload(DeviceBuffer& buffer, const std::vector<T>& values, const Stream& stream) {
    if (values.empty()) return;
    check(cudaMemcpyAsync(buffer.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream.get()),
          "The GPU failed");
}

std::size_t volume(const Shape& shape);
// Numbers of a floating type, as they came from the GPU.
std::vector<float> to_floats(const std::vector<char>& bytes, Element type);
// The engine's output that holds a result. Throws an Error where there is none.
const Tensor& find_result(const Engine& engine);

}  // namespace teamlora
