// TensorRT on a GPU. Not yet run on one: the engine's part (tensorrt_engine.cpp) is compiled, linked and run up to the
// missing driver; this part is tested with an engine and a CUDA that run on the CPU.
//
// A request takes one of a few lanes, each with its own execution contexts (one a profile), stream and buffers. The KV
// cache stays on the device. Two ways to keep it:
//
//   fixed     It has a fixed length, most of it masked out; a step's new row is copied into its slot. Shapes and
//             addresses stay the same, so that a step of decoding is one CUDA graph, recorded once for a length. What
//             is masked out is multiplied by zero, which is no zero if it is NaN: so it is cleared for each request.
//   growing   What a step gives out goes in at the next one, in two sets of buffers that change places. For models with
//             sliding windows, which count the rows between two tokens, so that none may be skipped.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <utility>

#include "backend.h"
#include "cuda.h"
#include "tensorrt_engine.h"

namespace teamlora {
namespace {

std::size_t size_of(Element type) {
    switch (type) {
        case Element::kInt64:
            return 8;
        case Element::kFloat32:
            return 4;
        default:
            return 2;
    }
}

std::size_t volume(const Shape& shape) {
    std::size_t size = 1;
    for (const std::int64_t length : shape) size *= static_cast<std::size_t>(length);
    return size;
}

std::vector<float> to_floats(const std::vector<char>& bytes, Element type) {
    std::vector<float> floats(bytes.size() / size_of(type));
    const auto convert = [&](const auto* data, auto to_float) {
        std::transform(data, data + floats.size(), floats.begin(), to_float);
    };
    if (type == Element::kFloat32) convert(reinterpret_cast<const float*>(bytes.data()), [](float x) { return x; });
    if (type == Element::kFloat16) {
        convert(reinterpret_cast<const __half*>(bytes.data()), [](__half x) { return __half2float(x); });
    }
    if (type == Element::kBfloat16) {
        convert(reinterpret_cast<const __nv_bfloat16*>(bytes.data()),
                [](__nv_bfloat16 x) { return __bfloat162float(x); });
    }
    return floats;
}

const Tensor& find_result(const Engine& engine) {
    for (const char* name : kResults) {
        for (const Tensor& tensor : engine.tensors()) {
            if (!tensor.is_input && tensor.name == name) return tensor;
        }
    }
    throw Error("The engine has no output that holds a result.");
}

// What one request at a time uses. Members are destroyed from the last to the first: contexts, buffers, then the
// stream.
struct Lane {
    explicit Lane(const Engine& engine)
        : prefill(engine.context(false, stream)), decode(engine.context(true, stream)) {}

    Stream stream;
    // The third input is position_ids or token_type_ids.
    DeviceBuffer ids, mask, third;
    // Of every output that is no cache.
    std::map<std::string, DeviceBuffer> results;
    std::vector<DeviceBuffer> past, present;
    std::unique_ptr<Context> prefill, decode;
    // A recorded step of decoding, for this batch and length of the cache.
    Graph graph;
    std::size_t batch = 0, length = 0;
};

// A few lanes; whoever finds none free waits.
class Lanes {
public:
    Lanes(const Engine& engine, int most) : engine_(engine), most_(std::max(most, 1)) {}

    std::shared_ptr<Lane> take() {
        std::unique_lock<std::mutex> lock(mutex_);
        free_again_.wait(lock, [&] { return !free_.empty() || made_ < most_; });
        std::unique_ptr<Lane> lane;
        if (free_.empty()) {
            lane = std::make_unique<Lane>(engine_);
            ++made_;
        } else {
            lane = std::move(free_.back());
            free_.pop_back();
        }
        return {lane.release(), [this](Lane* used) {
                    // Nothing of a request that failed may still be running.
                    cudaStreamSynchronize(used->stream.get());
                    const std::lock_guard<std::mutex> again(mutex_);
                    free_.emplace_back(used);
                    free_again_.notify_one();
                }};
    }

private:
    const Engine& engine_;
    int most_, made_ = 0;
    std::mutex mutex_;
    std::condition_variable free_again_;
    std::vector<std::unique_ptr<Lane>> free_;
};

// One call of the engine in a lane.
class Call {
public:
    Call(const Engine& engine, Lane& lane, Context& context) : engine_(engine), lane_(lane), context_(context) {}

    // Shapes of a call with ids [batch, tokens] and `past` tokens in the cache.
    void set_shapes(std::size_t batch, std::size_t tokens, std::size_t past) {
        for (const Tensor& tensor : engine_.tensors()) {
            if (!tensor.is_input) continue;
            Shape shape = tensor.shape;
            shape[0] = static_cast<std::int64_t>(batch);
            if (is_past(tensor.name)) {
                shape[2] = static_cast<std::int64_t>(past);
            } else {
                shape[1] = static_cast<std::int64_t>(tensor.name == "attention_mask" ? past + tokens : tokens);
            }
            context_.set_shape(tensor, shape);
        }
    }

    // Binds all but the caches. True: a result has another address than before.
    bool bind() {
        bool moved = false;
        for (const Tensor& tensor : engine_.tensors()) {
            if (tensor.name == "input_ids") context_.bind(tensor, lane_.ids.get());
            if (tensor.name == "attention_mask") context_.bind(tensor, lane_.mask.get());
            if (tensor.name == "position_ids" || tensor.name == "token_type_ids") {
                context_.bind(tensor, lane_.third.get());
            }
            if (tensor.is_input || is_present(tensor.name)) continue;
            DeviceBuffer& result = lane_.results[tensor.name];
            moved |= result.reserve(volume(context_.shape_of(tensor)) * size_of(tensor.type));
            context_.bind(tensor, result.get());
        }
        return moved;
    }

    // `past` and `present` hold a buffer for each cache, in the order of the inputs `caches`.
    void bind_cache(const std::vector<Tensor>& caches) {
        for (std::size_t i = 0; i < caches.size(); ++i) context_.bind(caches[i], lane_.past[i].get());
        for (const Tensor& tensor : engine_.tensors()) {
            if (!is_present(tensor.name)) continue;
            const auto found = std::find_if(caches.begin(), caches.end(),
                                            [&](const Tensor& cache) { return cache.name == past_name(tensor.name); });
            if (found == caches.end()) throw Error("The engine's outputs do not match its inputs.");
            context_.bind(tensor, lane_.present[static_cast<std::size_t>(found - caches.begin())].get());
        }
    }

    bool enqueue() { return context_.enqueue(lane_.stream); }

    void enqueue_or_throw() {
        if (!enqueue()) throw Error("The engine failed: " + engine_.last_error() + ".");
    }

private:
    const Engine& engine_;
    Lane& lane_;
    Context& context_;
};

void upload(DeviceBuffer& buffer, const Tokens& values, const Stream& stream) {
    check(cudaMemcpyAsync(buffer.get(), values.data(), values.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice,
                          stream.get()),
          "The GPU failed");
}

class DeviceCache : public Decoder {
public:
    DeviceCache(const Engine& engine, std::shared_ptr<Lane> lane, std::size_t batch, std::size_t most, bool fixed)
        : engine_(engine), lane_(std::move(lane)), logits_(find_result(engine)), batch_(batch), fixed_(fixed) {
        for (const Tensor& tensor : engine_.tensors()) {
            if (is_past(tensor.name)) caches_.push_back(tensor);
        }
        if (caches_.empty()) throw Error("The engine has no KV cache, so it cannot generate text.");
        const auto longest = static_cast<std::size_t>(engine_.at_most(caches_[0], true)[2]);
        if (most > longest + 1) {
            throw Error("The engine was built for " + std::to_string(longest + 1) + " tokens, this request needs " +
                        std::to_string(most) + ". Build it with other --shapes.");
        }
        // Few lengths, so that recorded steps serve again.
        constexpr std::size_t kStep = 256;
        length_ = fixed_ ? std::min((most + kStep - 1) / kStep * kStep, longest) : most;
        reserve();
    }

    const std::vector<float>& run(const Tokens& ids, const Tokens& mask, const Tokens& positions) override {
        const std::size_t tokens = ids.size() / batch_;
        if (filled_ == 0) {
            prefill(ids, mask, positions, tokens);
        } else if (fixed_) {
            step_in_place(ids, mask, positions);
        } else {
            step_growing(ids, mask, positions);
        }
        filled_ += tokens;
        // An engine may give the last token's alone.
        read_last(logits_.shape[1] == 1 ? 1 : tokens);
        return values_;
    }

private:
    std::size_t vocabulary() const { return static_cast<std::size_t>(logits_.shape[2]); }
    std::size_t heads(const Tensor& cache) const { return static_cast<std::size_t>(cache.shape[1]); }
    std::size_t row_bytes(const Tensor& cache) const {
        return static_cast<std::size_t>(cache.shape[3]) * size_of(cache.type);
    }

    void reserve() {
        Lane& lane = *lane_;
        bool moved = lane.batch != batch_ || lane.length != length_;
        const auto need = [&](DeviceBuffer& buffer, std::size_t size) { moved |= buffer.reserve(size); };
        for (DeviceBuffer* buffer : {&lane.ids, &lane.mask, &lane.third}) {
            need(*buffer, batch_ * (length_ + 1) * sizeof(std::int64_t));
        }
        lane.past.resize(caches_.size());
        lane.present.resize(caches_.size());
        for (std::size_t i = 0; i < caches_.size(); ++i) {
            const std::size_t size = batch_ * heads(caches_[i]) * (length_ + 1) * row_bytes(caches_[i]);
            need(lane.past[i], size);
            need(lane.present[i], size);
        }
        if (moved) lane.graph.clear();
        lane.batch = batch_;
        lane.length = length_;
    }

    void upload_all(const Tokens& ids, const Tokens& mask, const Tokens& positions) {
        upload(lane_->ids, ids, lane_->stream);
        upload(lane_->mask, mask, lane_->stream);
        upload(lane_->third, positions, lane_->stream);
    }

    void prefill(const Tokens& ids, const Tokens& mask, const Tokens& positions, std::size_t tokens) {
        upload_all(ids, mask, positions);
        Call call(engine_, *lane_, *lane_->prefill);
        call.set_shapes(batch_, tokens, 0);
        if (call.bind()) lane_->graph.clear();
        call.bind_cache(caches_);
        call.enqueue_or_throw();
        if (fixed_) {
            copy_rows(0, tokens, 0, tokens);
            clear_rows_from(tokens);
        } else {
            std::swap(lane_->past, lane_->present);
        }
    }

    void step_growing(const Tokens& ids, const Tokens& mask, const Tokens& positions) {
        upload_all(ids, mask, positions);
        Call call(engine_, *lane_, *lane_->decode);
        call.set_shapes(batch_, 1, filled_);
        call.bind();
        call.bind_cache(caches_);
        call.enqueue_or_throw();
        std::swap(lane_->past, lane_->present);
    }

    void step_in_place(const Tokens& ids, const Tokens& mask, const Tokens& positions) {
        upload_all(ids, with_unused_slots(mask), positions);
        if (!lane_->graph) decode_or_record();
        if (lane_->graph) lane_->graph.launch(lane_->stream);
        copy_rows(length_, 1, filled_, length_ + 1);
    }

    // The first call with these shapes does work that must not be recorded; the second is recorded.
    void decode_or_record() {
        Call call(engine_, *lane_, *lane_->decode);
        if (!ready_) {
            call.set_shapes(batch_, 1, length_);
            call.bind();
            call.bind_cache(caches_);
        } else if (records_) {
            records_ = lane_->graph.record(lane_->stream, [&] { return call.enqueue(); });
        }
        ready_ = true;
        if (!lane_->graph) call.enqueue_or_throw();
    }

    // [batch, filled + 1] -> [batch, length + 1]: slots not yet filled are masked out, the new token stands last.
    Tokens with_unused_slots(const Tokens& mask) const {
        const auto width = static_cast<std::ptrdiff_t>(mask.size() / batch_);
        Tokens whole(batch_ * (length_ + 1), 0);
        auto target = whole.begin();
        for (auto row = mask.begin(); row != mask.end(); row += width) {
            std::copy(row, row + width - 1, target);
            target += static_cast<std::ptrdiff_t>(length_ + 1);
            *(target - 1) = *(row + width - 1);
        }
        return whole;
    }

    // Copies `count` rows of every head, from row `from` of the outputs, which have `output_rows`, to slot `slot`.
    void copy_rows(std::size_t from, std::size_t count, std::size_t slot, std::size_t output_rows) {
        for (std::size_t i = 0; i < caches_.size(); ++i) {
            const std::size_t row = row_bytes(caches_[i]);
            check(cudaMemcpy2DAsync(static_cast<char*>(lane_->past[i].get()) + slot * row, length_ * row,
                                    static_cast<const char*>(lane_->present[i].get()) + from * row, output_rows * row,
                                    count * row, batch_ * heads(caches_[i]), cudaMemcpyDeviceToDevice,
                                    lane_->stream.get()),
                  "The GPU failed");
        }
    }

    // Slots from `slot` on hold what another request left, NaN perhaps; they are read, though masked out, until a step
    // fills them.
    void clear_rows_from(std::size_t slot) {
        for (std::size_t i = 0; i < caches_.size(); ++i) {
            const std::size_t row = row_bytes(caches_[i]);
            check(cudaMemset2DAsync(static_cast<char*>(lane_->past[i].get()) + slot * row, length_ * row, 0,
                                    (length_ - slot) * row, batch_ * heads(caches_[i]), lane_->stream.get()),
                  "The GPU failed");
        }
    }

    // From logits [batch, tokens, vocabulary] on the device.
    void read_last(std::size_t tokens) {
        const std::size_t row = vocabulary() * size_of(logits_.type);
        bytes_.resize(batch_ * row);
        check(cudaMemcpy2DAsync(bytes_.data(), row,
                                static_cast<const char*>(lane_->results[logits_.name].get()) + (tokens - 1) * row,
                                tokens * row, row, batch_, cudaMemcpyDeviceToHost, lane_->stream.get()),
              "The GPU failed");
        lane_->stream.wait();
        values_ = to_floats(bytes_, logits_.type);
    }

    const Engine& engine_;
    std::shared_ptr<Lane> lane_;
    const Tensor& logits_;
    std::vector<Tensor> caches_;
    std::size_t batch_, length_ = 0, filled_ = 0;
    bool fixed_, ready_ = false, records_ = true;
    std::vector<char> bytes_;
    std::vector<float> values_;
};

class TensorRT : public Backend {
public:
    TensorRT(const Folder& folder, const std::string& engine, int streams)
        : name_(engine), engine_(open_engine(folder, engine)), lanes_(*engine_, streams), fixed_(!folder.has_window) {}

    std::string description() const override { return "TensorRT, engine " + name_; }

    std::unique_ptr<Decoder> start(std::size_t batch, std::size_t most) const override {
        return std::make_unique<DeviceCache>(*engine_, lanes_.take(), batch, most, fixed_);
    }

    std::vector<float> encode(const Tokens& ids, const Tokens& mask, std::size_t batch) const override {
        const std::shared_ptr<Lane> lane = lanes_.take();
        const Tensor& result = find_result(*engine_);
        const Tokens types(ids.size(), 0);
        const auto give = [&](DeviceBuffer& buffer, const Tokens& values) {
            buffer.reserve(values.size() * sizeof(std::int64_t));
            upload(buffer, values, lane->stream);
        };
        give(lane->ids, ids);
        give(lane->mask, mask);
        give(lane->third, types);
        Call call(*engine_, *lane, *lane->prefill);
        call.set_shapes(batch, ids.size() / batch, 0);
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
    mutable Lanes lanes_;
    bool fixed_;
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
    return std::make_unique<TensorRT>(folder, name, options.streams);
}

}  // namespace teamlora
