#include "tensorrt_cache.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace teamlora {
namespace {

struct Request {
    const Engine& engine;
    std::shared_ptr<Lane> lane;
    std::vector<Tensor> caches;
    std::size_t batch, most;
    Slots rows;
};

std::size_t heads(const Tensor& cache) { return static_cast<std::size_t>(cache.shape[1]); }

std::size_t row_bytes(const Tensor& cache) { return static_cast<std::size_t>(cache.shape[3]) * size_of(cache.type); }

const Tensor& input_named(const Engine& engine, const std::string& name) {
    for (const Tensor& tensor : engine.tensors()) {
        if (tensor.is_input && tensor.name == name) return tensor;
    }
    throw Error("The engine has no input " + name + ".");
}

// The most tokens that a profile takes of an input [batch, tokens].
std::size_t most_tokens(const Engine& engine, const std::string& input, bool last) {
    return static_cast<std::size_t>(engine.at_most(input_named(engine, input), last)[1]);
}

// What the three ways have in common.
class DeviceCache : public Decoder {
public:
    const std::vector<float>& run(const Tokens& ids, const Tokens& mask, const Tokens& positions) final {
        const std::size_t tokens = ids.size() / batch_;
        if (filled_ + tokens > room_) {
            throw Error("The cache has room for " + std::to_string(room_) + " tokens, and this would be " +
                        std::to_string(filled_ + tokens) + ".");
        }
        upload(lane_->ids, ids, lane_->stream);
        upload(lane_->third, positions, lane_->stream);
        forward(mask, tokens);
        filled_ += tokens;
        // An engine may give the last token's alone.
        read_last(logits_.shape[1] == 1 ? 1 : tokens);
        return values_;
    }

protected:
    // `room`: how many tokens the cache takes.
    DeviceCache(Request request, std::size_t room)
        : lane_(std::move(request.lane)),
          caches_(std::move(request.caches)),
          batch_(request.batch),
          engine_(request.engine),
          logits_(find_result(engine_)),
          room_(room) {
        // As long as the lane is this request's.
        if (lane_->adapter.reserve(request.rows.size() * sizeof(std::int32_t))) lane_->graph.clear();
        upload(lane_->adapter, request.rows, lane_->stream);
    }

    // Runs so many tokens, whose ids and positions are on the device. The mask, [batch, filled + tokens], is not.
    virtual void forward(const Tokens& mask, std::size_t tokens) = 0;
    // Where the engine writes the cache to.
    virtual const std::vector<DeviceBuffer>& present() const { return lane_->present; }

    std::size_t filled() const { return filled_; }

    // Memory for `rows` tokens, also in `sets` of the cache. A step that was recorded with other memory is dropped.
    void reserve(std::size_t rows, std::initializer_list<std::vector<DeviceBuffer>*> sets) {
        bool moved = lane_->batch != batch_ || lane_->rows != rows;
        for (DeviceBuffer* buffer : {&lane_->ids, &lane_->mask, &lane_->third}) {
            moved |= buffer->reserve(batch_ * rows * sizeof(std::int64_t));
        }
        for (std::vector<DeviceBuffer>* set : sets) {
            set->resize(caches_.size());
            for (std::size_t i = 0; i < caches_.size(); ++i) {
                moved |= (*set)[i].reserve(batch_ * heads(caches_[i]) * rows * row_bytes(caches_[i]));
            }
        }
        if (moved) lane_->graph.clear();
        lane_->batch = batch_;
        lane_->rows = rows;
    }

    // Runs `tokens` with caches of `past` rows and a mask [batch, total].
    void call(Context& context, std::size_t tokens, std::size_t past, std::size_t total) {
        Call call(engine_, *lane_, context);
        call.set_shapes(batch_, tokens, past, total);
        if (call.bind()) ready_ = false;
        call.bind_cache(caches_, lane_->past, present());
        call.enqueue_or_throw();
    }

    // A step of decoding whose shapes and addresses are the same each time. The first call with them does work that
    // must not be recorded; the second is recorded.
    void step(std::size_t past, std::size_t total) {
        if (!lane_->graph && !ready_) {
            call(*lane_->decode, 1, past, total);
            ready_ = true;
            return;
        }
        Call same(engine_, *lane_, *lane_->decode);
        if (!lane_->graph && records_) records_ = lane_->graph.record(lane_->stream, [&] { return same.enqueue(); });
        if (lane_->graph) {
            lane_->graph.launch(lane_->stream);
        } else {
            same.enqueue_or_throw();
        }
    }

    // Rows of a cache that has `length`, from `row` on.
    void clear_rows_from(std::size_t row, std::size_t length) {
        for (std::size_t i = 0; i < caches_.size(); ++i) {
            const std::size_t size = row_bytes(caches_[i]);
            check(cudaMemset2DAsync(static_cast<char*>(lane_->past[i].get()) + row * size, length * size, 0,
                                    (length - row) * size, batch_ * heads(caches_[i]), lane_->stream.get()),
                  "The GPU failed");
        }
    }

    std::shared_ptr<Lane> lane_;
    std::vector<Tensor> caches_;
    std::size_t batch_;

private:
    // From logits [batch, tokens, vocabulary] on the device.
    void read_last(std::size_t tokens) {
        const std::size_t row = static_cast<std::size_t>(logits_.shape[2]) * size_of(logits_.type);
        bytes_.resize(batch_ * row);
        check(cudaMemcpy2DAsync(bytes_.data(), row,
                                static_cast<const char*>(lane_->results[logits_.name].get()) + (tokens - 1) * row,
                                tokens * row, row, batch_, cudaMemcpyDeviceToHost, lane_->stream.get()),
              "The GPU failed");
        lane_->stream.wait();
        values_ = to_floats(bytes_, logits_.type);
    }

    const Engine& engine_;
    const Tensor& logits_;
    std::size_t room_, filled_ = 0;
    bool ready_ = false, records_ = true;
    std::vector<char> bytes_;
    std::vector<float> values_;
};

class InPlaceCache : public DeviceCache {
public:
    explicit InPlaceCache(const Request& request)
        : DeviceCache(request, capacity_of(request)),
          capacity_(capacity_of(request)),
          part_(std::min(kPart, most_tokens(request.engine, "input_ids", false))) {
        reserve(capacity_, {&lane_->past});
        clear_rows_from(0, capacity_);
    }

    static bool fits(const std::vector<Tensor>& caches) { return caches[0].shape[2] > 0; }

    std::size_t part() const override { return part_; }

private:
    static std::size_t capacity_of(const Request& request) {
        return static_cast<std::size_t>(request.caches[0].shape[2]);
    }

    // A token's place follows from the last place that its row's mask names, so that the mask may have the width of the
    // whole capacity at every call. The engine would widen it to that anyway.
    void forward(const Tokens& mask, std::size_t tokens) override {
        upload(lane_->mask, widened(mask), lane_->stream);
        if (tokens == 1) {
            step(capacity_, capacity_);
        } else {
            call(*lane_->prefill, tokens, capacity_, capacity_);
        }
    }

    const std::vector<DeviceBuffer>& present() const override { return lane_->past; }

    // [batch, filled + tokens] -> [batch, capacity]
    Tokens widened(const Tokens& mask) const {
        const std::size_t width = mask.size() / batch_;
        Tokens whole(batch_ * capacity_, 0);
        for (std::size_t row = 0; row < batch_; ++row) {
            std::copy_n(mask.data() + row * width, width, whole.data() + row * capacity_);
        }
        return whole;
    }

    std::size_t capacity_, part_;
};

class FixedCache : public DeviceCache {
public:
    explicit FixedCache(const Request& request)
        : DeviceCache(request, length_for(request)), length_(length_for(request)) {
        reserve(length_ + 1, {&lane_->past, &lane_->present});
    }

private:
    // Few lengths, so that recorded steps serve again. A mask has one column more.
    static std::size_t length_for(const Request& request) {
        constexpr std::size_t kStep = 256;
        return std::min((request.most + kStep - 1) / kStep * kStep,
                        most_tokens(request.engine, "attention_mask", true) - 1);
    }

    void forward(const Tokens& mask, std::size_t tokens) override {
        if (filled() == 0) {
            upload(lane_->mask, mask, lane_->stream);
            call(*lane_->prefill, tokens, 0, tokens);
            copy_rows(0, tokens, 0, tokens);
            // Until a step fills them, slots hold what another request left.
            clear_rows_from(tokens, length_);
        } else {
            upload(lane_->mask, with_unused_slots(mask), lane_->stream);
            step(length_, length_ + 1);
            copy_rows(length_, 1, filled(), length_ + 1);
        }
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

    std::size_t length_;
};

class GrowingCache : public DeviceCache {
public:
    explicit GrowingCache(const Request& request) : DeviceCache(request, request.most) {
        reserve(request.most, {&lane_->past, &lane_->present});
    }

private:
    void forward(const Tokens& mask, std::size_t tokens) override {
        upload(lane_->mask, mask, lane_->stream);
        call(filled() == 0 ? *lane_->prefill : *lane_->decode, tokens, filled(), filled() + tokens);
        std::swap(lane_->past, lane_->present);
    }
};

}  // namespace

std::unique_ptr<Decoder> open_cache(const Engine& engine, Lanes& lanes, std::size_t batch, std::size_t most,
                                    const Slots& rows, bool windowed) {
    std::vector<Tensor> caches;
    for (const Tensor& tensor : engine.tensors()) {
        if (is_past(tensor.name)) caches.push_back(tensor);
    }
    if (caches.empty()) throw Error("The engine has no KV cache, so it cannot generate text.");
    const std::size_t longest = most_tokens(engine, "attention_mask", true);
    if (most > longest) {
        throw Error("The engine was built for " + std::to_string(longest) + " tokens, this request needs " +
                    std::to_string(most) + ". Build it with other --shapes.");
    }
    const bool in_place = InPlaceCache::fits(caches);
    const Request request{engine, lanes.take(), std::move(caches), batch, most, rows};
    if (in_place) return std::make_unique<InPlaceCache>(request);
    if (windowed) return std::make_unique<GrowingCache>(request);
    return std::make_unique<FixedCache>(request);
}

}  // namespace teamlora
