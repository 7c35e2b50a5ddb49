// An "engine" that is an ONNX model, run by ONNX Runtime on the emulated device's memory. Like TensorRT, it runs what
// was bound when it was enqueued, refuses shapes outside of a profile, and cannot be recorded before it has run once.
// Its cache is in place where the model's has a capacity in numbers.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <map>

#include "emulated_cuda.h"
#include "runner/backend.h"
#include "runner/tensorrt_engine.h"

namespace teamlora {
namespace {

constexpr std::int64_t kMostTokens = 300;

ONNXTensorElementDataType onnx_type(Element type) {
    if (type == Element::kInt64) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    if (type == Element::kInt32) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    return type == Element::kFloat32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

struct Model {
    Ort::Env environment{ORT_LOGGING_LEVEL_ERROR, "emulated"};
    Ort::Session session{nullptr};
    std::vector<Tensor> tensors;
    // Of a cache in place; 0: it grows.
    std::int64_t capacity = 0;

    // What a profile takes at most, but for the batch.
    std::int64_t most(const std::string& input, bool decodes) const {
        if (is_past(input)) return capacity > 0 ? capacity : decodes ? kMostTokens - 1 : 0;
        if (input == "attention_mask") return capacity > 0 ? capacity : kMostTokens;
        return decodes ? 1 : kMostTokens;
    }
};

class EmulatedContext : public Context {
public:
    EmulatedContext(Model& model, bool decodes) : model_(model), decodes_(decodes) {}

    void set_shape(const Tensor& input, const Shape& shape) override {
        if (input.name != kAdapterInput) check_profile(input, shape);
        shapes_[input.name] = shape;
        has_run_ = false;
    }

    Shape shape_of(const Tensor& output) const override { return output_shape(output, shapes_); }

    void bind(const Tensor& tensor, void* address) override { addresses_[tensor.name] = address; }

    bool enqueue(const Stream& stream) override {
        if (emulated::is_recording() && !has_run_) return false;
        has_run_ = true;
        emulated::enqueue(stream.get(), [this, shapes = shapes_, addresses = addresses_] { run(shapes, addresses); });
        return true;
    }

private:
    void check_profile(const Tensor& input, const Shape& shape) const {
        const std::int64_t size = shape[is_past(input.name) ? 2 : 1], most = model_.most(input.name, decodes_);
        const bool fixed = is_past(input.name) && model_.capacity > 0;
        if (size > most || (fixed && size < most)) {
            throw Error("The profile takes " + std::to_string(most) + " of " + input.name + ", not " +
                        std::to_string(size) + ".");
        }
    }

    Shape output_shape(const Tensor& output, const std::map<std::string, Shape>& shapes) const {
        Shape shape = output.shape;
        const Shape& ids = shapes.at("input_ids");
        shape[0] = ids[0];
        if (is_present(output.name)) {
            shape[2] = model_.capacity > 0 ? model_.capacity : shapes.at(past_name(output.name))[2] + ids[1];
        } else if (shape.size() > 2 && shape[1] < 0) {
            shape[1] = ids[1];
        }
        return shape;
    }

    void run(const std::map<std::string, Shape>& shapes, const std::map<std::string, void*>& addresses) const {
        std::vector<const char*> input_names, output_names;
        std::vector<Ort::Value> inputs, outputs;
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
        for (const Tensor& tensor : model_.tensors) {
            const auto given = shapes.find(tensor.name);
            // Slots have their own shape.
            const Shape shape = !tensor.is_input        ? output_shape(tensor, shapes)
                                : given != shapes.end() ? given->second
                                                        : tensor.shape;
            std::size_t bytes = size_of(tensor.type);
            for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
            (tensor.is_input ? input_names : output_names).push_back(tensor.name.c_str());
            (tensor.is_input ? inputs : outputs)
                .push_back(Ort::Value::CreateTensor(memory, addresses.at(tensor.name), bytes, shape.data(),
                                                    shape.size(), onnx_type(tensor.type)));
        }
        model_.session.Run(Ort::RunOptions(nullptr), input_names.data(), inputs.data(), inputs.size(),
                           output_names.data(), outputs.data(), outputs.size());
    }

    Model& model_;
    bool decodes_, has_run_ = false;
    std::map<std::string, Shape> shapes_;
    std::map<std::string, void*> addresses_;
};

class EmulatedEngine : public Engine {
public:
    explicit EmulatedEngine(const std::filesystem::path& path) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(1);
        model_.session = Ort::Session(model_.environment, path.c_str(), options);
        const Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < model_.session.GetInputCount(); ++i) {
            add(model_.session.GetInputNameAllocated(i, allocator).get(), model_.session.GetInputTypeInfo(i), true);
        }
        for (std::size_t i = 0; i < model_.session.GetOutputCount(); ++i) {
            add(model_.session.GetOutputNameAllocated(i, allocator).get(), model_.session.GetOutputTypeInfo(i), false);
        }
    }

    const std::vector<Tensor>& tensors() const override { return model_.tensors; }
    std::unique_ptr<Context> context(bool last, const Stream&) const override {
        return std::make_unique<EmulatedContext>(model_, last);
    }
    Shape at_most(const Tensor& input, bool last) const override {
        Shape shape = input.shape;
        shape[0] = 4;
        shape[is_past(input.name) ? 2 : 1] = model_.most(input.name, last);
        return shape;
    }
    std::string last_error() const override { return "emulated"; }

private:
    void add(const char* name, const Ort::TypeInfo& info, bool is_input) {
        const auto tensor = info.GetTensorTypeAndShapeInfo();
        const auto type = tensor.GetElementType();
        const Element element = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64   ? Element::kInt64
                                : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 ? Element::kInt32
                                : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? Element::kFloat32
                                                                              : Element::kFloat16;
        model_.tensors.push_back({name, element, tensor.GetShape(), is_input});
        if (is_past(name)) model_.capacity = std::max<std::int64_t>(tensor.GetShape()[2], 0);
    }

    mutable Model model_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Folder& folder, const std::string& name) {
    return std::make_unique<EmulatedEngine>(folder.engine(name));
}

}  // namespace teamlora
