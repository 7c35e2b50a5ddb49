// ONNX Runtime on the CPU. Without a native library for the op, its definition inside the model runs.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <optional>
#include <utility>

#include "backend.h"
#include "cores.h"
#include "onnxruntime_slots.h"
#include "pages.h"

namespace teamlora {
namespace {

constexpr int kMostThreads = 1024;
constexpr const char* kSpinMicroseconds = "20";
constexpr std::size_t kLeastCapacity = 256;
constexpr std::size_t kWidestWindow = 999'999'999;

// The first line of what ONNX Runtime says.
std::string brief(const std::exception& error) {
    const std::string text = error.what();
    return text.substr(0, std::min<std::size_t>(text.find('\n'), 300));
}

struct Port {
    std::string name;
    ONNXTensorElementDataType type;
    std::vector<std::int64_t> shape;
    // A cache that is written in place, into a buffer longer than what it holds.
    bool in_place = false;
    // So many tokens are seen in its layer; 0: all.
    std::size_t window = 0;
};

// Elements from `start` on, as float32.
std::vector<float> read_floats(const Ort::Value& value, std::size_t start, std::size_t count) {
    const auto type = value.GetTensorTypeAndShapeInfo().GetElementType();
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        const float* data = value.GetTensorData<float>() + start;
        return {data, data + count};
    }
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
        throw Error("The model's output is neither float32 nor float16.");
    const auto* data = value.GetTensorData<Ort::Float16_t>() + start;
    std::vector<float> floats(count);
    std::transform(data, data + count, floats.begin(), [](Ort::Float16_t half) { return half.ToFloat(); });
    return floats;
}

// Of a cache, which is in float32 or float16.
std::size_t bytes_of(const Ort::Value& value) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    return info.GetElementCount() * (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2);
}

class OnnxRuntime : public Backend {
public:
    OnnxRuntime(const Folder& folder, const Options& options) {
        if (options.threads < 0 || options.threads > kMostThreads) {
            throw Error(std::to_string(options.threads) + " threads: give 0 to " + std::to_string(kMostThreads) + ".");
        }
        Ort::SessionOptions session_options;
        // A number that is given binds no thread to a core, where another process may be at work.
        session_options.SetIntraOpNumThreads(options.threads == 0 ? usable_cores() : options.threads);
        // Threads that spin long wait for each other as soon as another process has one of their cores; threads that
        // do not spin wake too late for the next kernel.
        session_options.AddConfigEntry("session.intra_op.spin_duration_us", kSpinMicroseconds);
        session_options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
        try {
            if (!options.op_library.empty()) {
                // A bare name would be looked for in the system's folders.
                session_options.RegisterCustomOpsLibrary(std::filesystem::absolute(options.op_library).c_str());
            }
        } catch (const Ort::Exception& error) {
            throw Error(options.op_library.string() + ": cannot be loaded as a library of ops (" + brief(error) + ").");
        }
        try {
            session_ = Ort::Session(environment_, folder.model().c_str(), session_options);
            read_ports();
            slots_ = OnnxRuntimeSlots(session_, folder, options);
            sweep_.emplace();
        } catch (const Ort::Exception& error) {
            throw Error(folder.model().string() + ": ONNX Runtime " + Ort::GetVersionString() + " cannot load it (" +
                        brief(error) + ").");
        }
    }

    std::string description() const override { return "ONNX Runtime " + Ort::GetVersionString(); }

    Adapters* adapters() const override { return slots_.adapters(); }

    std::unique_ptr<Decoder> start(std::size_t batch, std::size_t most, const Slots& slots) const override;

    std::vector<float> encode(const Tokens& ids, const Tokens& mask, std::size_t batch,
                              const Slots& slots) const override {
        const Tokens types(ids.size(), 0);
        std::vector<Ort::Value> values;
        for (const Port& input : inputs_) values.push_back(numbers(named(input.name, ids, mask, types), batch));
        slots_.add_values(values, slots);
        const std::vector<Ort::Value> outputs = run(values, {result()});
        return read_floats(outputs[0], 0, outputs[0].GetTensorTypeAndShapeInfo().GetElementCount());
    }

    const Port& result() const {
        for (const char* name : kResults) {
            for (const Port& output : outputs_) {
                if (output.name == name) return output;
            }
        }
        throw Error("The model has no output that holds a result.");
    }

    const std::vector<Port>& inputs() const { return inputs_; }
    const std::vector<Port>& outputs() const { return outputs_; }
    const OnnxRuntimeSlots& slots() const { return slots_; }

    std::vector<Ort::Value> run(const std::vector<Ort::Value>& values, const std::vector<Port>& wanted) const {
        std::vector<Ort::Value> outputs;
        for (std::size_t i = 0; i < wanted.size(); ++i) outputs.emplace_back(nullptr);
        run_into(outputs, values, wanted);
        return outputs;
    }

    // Into the tensors of `outputs`; where one is null, it is made.
    void run_into(std::vector<Ort::Value>& outputs, const std::vector<Ort::Value>& values,
                  const std::vector<Port>& wanted) const {
        std::vector<const char*> input_names, output_names;
        for (const Port& input : inputs_) input_names.push_back(input.name.c_str());
        slots_.add_names(input_names);
        for (const Port& output : wanted) output_names.push_back(output.name.c_str());
        try {
            session_.Run(Ort::RunOptions(nullptr), input_names.data(), values.data(), values.size(),
                         output_names.data(), outputs.data(), outputs.size());
        } catch (const Ort::Exception& error) {
            throw Error("ONNX Runtime cannot run the model (" + brief(error) + ").");
        }
    }

    // A tensor [batch, rest] that reads `values` in place.
    static Ort::Value numbers(const Tokens& values, std::size_t batch) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const std::int64_t shape[] = {static_cast<std::int64_t>(batch),
                                      static_cast<std::int64_t>(values.size() / batch)};
        return Ort::Value::CreateTensor<std::int64_t>(memory, const_cast<std::int64_t*>(values.data()), values.size(),
                                                      shape, 2);
    }

    static const Tokens& named(const std::string& name, const Tokens& ids, const Tokens& mask, const Tokens& third) {
        if (name == "input_ids") return ids;
        if (name == "attention_mask") return mask;
        if (name == "position_ids" || name == "token_type_ids") return third;
        throw Error("The model has an input " + name + ", which this program does not know.");
    }

private:
    void read_ports() {
        const Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
            inputs_.push_back(port(session_.GetInputNameAllocated(i, allocator).get(), session_.GetInputTypeInfo(i)));
            if (is_past(inputs_.back().name)) require_cache(inputs_.back());
        }
        for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
            outputs_.push_back(
                port(session_.GetOutputNameAllocated(i, allocator).get(), session_.GetOutputTypeInfo(i)));
        }
    }

    static Port port(std::string name, const Ort::TypeInfo& info) {
        if (info.GetONNXType() != ONNX_TYPE_TENSOR) throw Error("The model's " + name + " is not a tensor.");
        const auto tensor = info.GetTensorTypeAndShapeInfo();
        std::vector<const char*> axes(tensor.GetDimensionsCount());
        tensor.GetSymbolicDimensions(axes.data(), axes.size());
        const std::string tokens = axes.size() == 4 ? axes[2] : "";
        const std::size_t window = window_of(tokens);
        const bool in_place = window > 0 || tokens == "capacity";
        return {std::move(name), tensor.GetElementType(), tensor.GetShape(), in_place, window};
    }

    // "window_4096" -> 4096; another name of an axis -> 0.
    static std::size_t window_of(const std::string& axis) {
        const std::string prefix = "window_";
        if (axis.rfind(prefix, 0) != 0) return 0;
        std::size_t window = 0;
        const char* end = axis.data() + axis.size();
        const auto [rest, error] = std::from_chars(axis.data() + prefix.size(), end, window);
        return error == std::errc() && rest == end && window <= kWidestWindow ? window : 0;
    }

    // [batch, heads, tokens, size of a head]
    static void require_cache(const Port& cache) {
        const bool floats =
            cache.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || cache.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        if (!floats || cache.shape.size() != 4 || cache.shape[1] < 1 || cache.shape[3] < 1) {
            throw Error("The model's cache " + cache.name + " is not one that this program knows.");
        }
    }

    Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "teamlora"};
    // Run is not const, though it may be called by many threads.
    mutable Ort::Session session_{nullptr};
    std::vector<Port> inputs_, outputs_;
    OnnxRuntimeSlots slots_;
    std::optional<PageSweep> sweep_;
};

// What both ways to keep a cache have in common.
class Cache : public Decoder {
public:
    Cache(const OnnxRuntime& model, std::size_t batch, const Slots& slots)
        : model_(model), batch_(batch), slots_(slots) {
        const auto add = [&](auto matches) {
            const auto found = std::find_if(model_.outputs().begin(), model_.outputs().end(), matches);
            if (found == model_.outputs().end()) throw Error("The model's outputs do not match its inputs.");
            outputs_.push_back(*found);
        };
        add([](const Port& output) { return output.name == "logits"; });
        for (const Port& input : model_.inputs()) {
            if (!is_past(input.name)) continue;
            add([&](const Port& output) { return is_present(output.name) && past_name(output.name) == input.name; });
        }
        for (const Port& input : model_.inputs())
            values_.push_back(is_past(input.name) ? zeros(input, 0) : Ort::Value(nullptr));
        model_.slots().add_values(values_, slots_);
    }

    std::size_t part() const override { return kPart; }

protected:
    // Puts what a call reads among the inputs, which must outlive it.
    void set_numbers(const Tokens& ids, const Tokens& mask, const Tokens& positions) {
        for (std::size_t i = 0; i < model_.inputs().size(); ++i) {
            const std::string& name = model_.inputs()[i].name;
            if (!is_past(name))
                values_[i] = OnnxRuntime::numbers(OnnxRuntime::named(name, ids, mask, positions), batch_);
        }
    }

    // A tensor of zeros for `cache`, [batch, heads, places, size of a head].
    Ort::Value zeros(const Port& cache, std::size_t places) const {
        std::vector<std::int64_t> shape = cache.shape;
        shape[0] = static_cast<std::int64_t>(batch_);
        shape[2] = static_cast<std::int64_t>(places);
        Ort::Value made = Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), cache.type);
        std::fill_n(static_cast<char*>(made.GetTensorMutableRawData()), bytes_of(made), 0);
        return made;
    }

    // From logits [batch, tokens, vocabulary].
    const std::vector<float>& read_last(const Ort::Value& value) {
        const std::vector<std::int64_t> shape = value.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.size() != 3 || shape[0] != static_cast<std::int64_t>(batch_) || shape[1] < 1 || shape[2] < 1) {
            throw Error("The model's logits are not one row of the vocabulary for each token.");
        }
        const auto tokens = static_cast<std::size_t>(shape[1]), vocabulary = static_cast<std::size_t>(shape[2]);
        logits_.clear();
        for (std::size_t row = 0; row < batch_; ++row) {
            const std::vector<float> last = read_floats(value, ((row + 1) * tokens - 1) * vocabulary, vocabulary);
            logits_.insert(logits_.end(), last.begin(), last.end());
        }
        return logits_;
    }

    const OnnxRuntime& model_;
    std::size_t batch_;
    // The logits, then the cache in the order in which it goes in again.
    std::vector<Port> outputs_;
    // In the order of the model's inputs, and what rows with adapters take beside them, which reads
    // `slots_`.
    std::vector<Ort::Value> values_;

private:
    const Slots slots_;
    Ort::AllocatorWithDefaultOptions allocator_;
    std::vector<float> logits_;
};

// The cache is what the last call gave out.
class GrowingCache : public Cache {
public:
    using Cache::Cache;

    const std::vector<float>& run(const Tokens& ids, const Tokens& mask, const Tokens& positions) override {
        set_numbers(ids, mask, positions);
        std::vector<Ort::Value> outputs = model_.run(values_, outputs_);
        std::size_t next = 1;
        for (std::size_t i = 0; i < model_.inputs().size(); ++i) {
            if (is_past(model_.inputs()[i].name)) values_[i] = std::move(outputs[next++]);
        }
        return read_last(outputs[0]);
    }
};

// The cache is a buffer for each layer and kind, into which the model writes: input and output are one memory. It is
// made longer by a quarter when it is full, up to the `most` tokens of the request: attention goes over all of it, so
// that what is not used yet costs time. In a layer that sees a window of the text, a buffer that has room for the
// window and a part of the prompt is a ring: the model writes over what is not seen any more, and it grows no further.
class InPlaceCache : public Cache {
public:
    InPlaceCache(const OnnxRuntime& model, std::size_t batch, std::size_t most, const Slots& slots)
        : Cache(model, batch, slots), most_(most) {}

    const std::vector<float>& run(const Tokens& ids, const Tokens& mask, const Tokens& positions) override {
        const std::size_t needed = mask.size() / batch_;
        if (needed > capacity_)
            grow(std::min(std::max({needed, capacity_ * 5 / 4, kLeastCapacity}), std::max(needed, most_)));
        set_numbers(ids, mask, positions);
        // Their size is the call's.
        ends_[0] = Ort::Value(nullptr);
        model_.run_into(ends_, values_, outputs_);
        return read_last(ends_[0]);
    }

private:
    void grow(std::size_t capacity) {
        ends_.clear();
        ends_.emplace_back(nullptr);
        for (std::size_t i = 0; i < model_.inputs().size(); ++i) {
            const Port& input = model_.inputs()[i];
            if (!is_past(input.name)) continue;
            // What a ring holds stands where it stood, as long as it was not full: it wraps from then on.
            const std::size_t most = input.window > 0 ? input.window - 1 + kPart : capacity;
            Ort::Value larger = zeros(input, std::min(capacity, most));
            copy_rows(values_[i], larger, batch_ * static_cast<std::size_t>(input.shape[1]));
            values_[i] = std::move(larger);
            ends_.push_back(same_memory(values_[i]));
        }
        capacity_ = capacity;
    }

    // What each of `rows` (of a head in the batch) holds.
    static void copy_rows(const Ort::Value& from, Ort::Value& to, std::size_t rows) {
        const std::size_t length = bytes_of(from) / rows, step = bytes_of(to) / rows;
        const auto* source = static_cast<const char*>(from.GetTensorRawData());
        auto* target = static_cast<char*>(to.GetTensorMutableRawData());
        for (std::size_t row = 0; row < rows; ++row) std::copy_n(source + row * length, length, target + row * step);
    }

    static Ort::Value same_memory(Ort::Value& value) {
        const auto info = value.GetTensorTypeAndShapeInfo();
        const std::vector<std::int64_t> shape = info.GetShape();
        return Ort::Value::CreateTensor(value.GetTensorMemoryInfo(), value.GetTensorMutableRawData(), bytes_of(value),
                                        shape.data(), shape.size(), info.GetElementType());
    }

    std::size_t most_, capacity_ = 0;
    // In the order of `outputs_`.
    std::vector<Ort::Value> ends_;
};

std::unique_ptr<Decoder> OnnxRuntime::start(std::size_t batch, std::size_t most, const Slots& slots) const {
    const auto cache =
        std::find_if(inputs_.begin(), inputs_.end(), [](const Port& input) { return is_past(input.name); });
    if (cache == inputs_.end()) throw Error("The model has no KV cache, so it cannot generate text.");
    if (cache->in_place) return std::make_unique<InPlaceCache>(*this, batch, most, slots);
    return std::make_unique<GrowingCache>(*this, batch, slots);
}

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const Folder& folder, const Options& options) {
    return std::make_unique<OnnxRuntime>(folder, options);
}

}  // namespace teamlora
