#include "tensorrt_lane.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "backend.h"

namespace teamlora {

Lanes::Lanes(const Engine& engine, const TensorRTSlots& slots, int most)
    : engine_(engine), slots_(slots), most_(std::max(most, 1)) {}

std::shared_ptr<Lane> Lanes::take() {
    std::unique_lock<std::mutex> lock(mutex_);
    free_again_.wait(lock, [&] { return !free_.empty() || made_ < most_; });
    std::unique_ptr<Lane> lane;
    if (free_.empty()) {
        lane = std::make_unique<Lane>(engine_, slots_);
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

void Call::set_shapes(std::size_t batch, std::size_t tokens, std::size_t past, std::size_t total) {
    for (const Tensor& tensor : engine_.tensors()) {
        if (!tensor.is_input || has_slots(tensor)) continue;
        Shape shape = tensor.shape;
        shape[0] = static_cast<std::int64_t>(batch);
        if (is_past(tensor.name)) {
            shape[2] = static_cast<std::int64_t>(past);
        } else if (tensor.name != kAdapterInput) {
            shape[1] = static_cast<std::int64_t>(tensor.name == "attention_mask" ? total : tokens);
        }
        context_.set_shape(tensor, shape);
    }
}

bool Call::bind() {
    bool moved = false;
    for (const Tensor& tensor : engine_.tensors()) {
        if (tensor.name == "input_ids") context_.bind(tensor, lane_.ids.get());
        if (tensor.name == "attention_mask") context_.bind(tensor, lane_.mask.get());
        if (tensor.name == "position_ids" || tensor.name == "token_type_ids") {
            context_.bind(tensor, lane_.third.get());
        }
        if (tensor.name == kAdapterInput) context_.bind(tensor, lane_.adapter.get());
        if (tensor.is_input || is_present(tensor.name)) continue;
        DeviceBuffer& result = lane_.results[tensor.name];
        const std::size_t size = volume(context_.shape_of(tensor)) * size_of(tensor.type);
        if (size > result.size()) {
            // Before its memory goes: there may be no other, and the lane serves again.
            lane_.graph.clear();
            result.reserve(size);
            moved = true;
        }
        context_.bind(tensor, result.get());
    }
    return moved;
}

void Call::bind_cache(const std::vector<Tensor>& caches, const std::vector<DeviceBuffer>& past,
                      const std::vector<DeviceBuffer>& present) {
    for (std::size_t i = 0; i < caches.size(); ++i) context_.bind(caches[i], past[i].get());
    for (const Tensor& tensor : engine_.tensors()) {
        if (!is_present(tensor.name)) continue;
        const auto found = std::find_if(caches.begin(), caches.end(),
                                        [&](const Tensor& cache) { return cache.name == past_name(tensor.name); });
        if (found == caches.end()) throw Error("The engine's outputs do not match its inputs.");
        context_.bind(tensor, present[static_cast<std::size_t>(found - caches.begin())].get());
    }
}

void Call::enqueue_or_throw() {
    if (!enqueue()) throw Error("The engine failed: " + engine_.last_error() + ".");
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

}  // namespace teamlora
