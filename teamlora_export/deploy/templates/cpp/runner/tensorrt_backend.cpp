// TensorRT on a GPU. Not yet run on one: the engine's part (tensorrt_engine.cpp) is compiled, linked and run up to the
// missing driver; what lies above it is tested with an engine and a CUDA that run on the CPU.
//
// A request takes one of a few lanes (tensorrt_lane.h), each with its own execution contexts (one a profile), stream
// and buffers. The KV cache stays on the device (tensorrt_cache.h).
#include <algorithm>

#include "backend.h"
#include "tensorrt_cache.h"
#include "tensorrt_engine.h"
#include "tensorrt_lane.h"
#include "tensorrt_slots.h"

namespace teamlora {
namespace {

class TensorRT : public Backend {
public:
    TensorRT(const Folder& folder, const std::string& engine, const Options& options)
        : name_(engine),
          engine_(open_engine(folder, engine)),
          slots_(*engine_, folder, options),
          lanes_(*engine_, slots_, options.streams),
          windowed_(folder.has_window) {}

    std::string description() const override { return "TensorRT, engine " + name_; }

    Adapters* adapters() const override { return slots_.adapters(); }

    std::unique_ptr<Decoder> start(std::size_t batch, std::size_t most, const Slots& slots) const override {
        return open_cache(*engine_, lanes_, batch, most, slots_.rows(slots, batch), windowed_);
    }

    std::vector<float> encode(const Tokens& ids, const Tokens& mask, std::size_t batch,
                              const Slots& slots) const override {
        const std::shared_ptr<Lane> lane = lanes_.take();
        const Tensor& result = find_result(*engine_);
        const Tokens types(ids.size(), 0);
        const auto give = [&](DeviceBuffer& buffer, const auto& values) {
            buffer.reserve(values.size() * sizeof(values[0]));
            upload(buffer, values, lane->stream);
        };
        give(lane->ids, ids);
        give(lane->mask, mask);
        give(lane->third, types);
        give(lane->adapter, slots_.rows(slots, batch));
        const std::size_t tokens = ids.size() / batch;
        Call call(*engine_, *lane, *lane->prefill);
        call.set_shapes(batch, tokens, 0, tokens);
        call.bind();
        call.enqueue_or_throw();
        std::vector<char> bytes(volume(lane->prefill->shape_of(result)) * size_of(result.type));
        check(cudaMemcpyAsync(bytes.data(), lane->results[result.name].get(), bytes.size(), cudaMemcpyDeviceToHost,
                              lane->stream.get()),
              "The GPU failed");
        lane->stream.wait();
        return to_floats(bytes, result.type);
    }

private:
    std::string name_;
    std::unique_ptr<Engine> engine_;
    TensorRTSlots slots_;
    mutable Lanes lanes_;
    bool windowed_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Folder& folder, const Options& options) {
    const auto& there = folder.engines;
    if (there.empty()) throw Error(folder.path.string() + ": holds no engine. Deploy it with --engine.");
    if (options.engine.empty() && there.size() > 1) throw Error("There is more than one engine: name one.");
    const std::string name = options.engine.empty() ? there[0] : options.engine;
    if (std::find(there.begin(), there.end(), name) == there.end()) {
        throw Error(folder.engine(name).string() + ": there is no such engine.");
    }
    return std::make_unique<TensorRT>(folder, name, options);
}

}  // namespace teamlora
