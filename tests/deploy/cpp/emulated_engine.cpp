// An "engine" that is an ONNX model, run by ONNX Runtime on the emulated device's memory. Like TensorRT, it runs what
// was bound when it was enqueued, refuses shapes outside of a profile, and cannot be recorded before it has run once.
#include <onnxruntime_cxx_api.h>

#include <map>

#include "emulated_cuda.h"
#include "runner/backend.h"
#include "runner/tensorrt_engine.h"

namespace teamlora {
namespace {

constexpr std::int64_t kMostTokens = 300;

ONNXTensorElementDataType onnx_type(Element type) {
    if (type == Element::kInt64) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    return type == Element::kFloat32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

struct Model {
    Ort::Env environment{ORT_LOGGING_LEVEL_ERROR, "emulated"};
    Ort::Session session{nullptr};
    std::vector<Tensor> tensors;
};

class EmulatedContext : public Context {
public:
    EmulatedContext(Model& model, bool decodes) : model_(model), decodes_(decodes) {}

    void set_shape(const Tensor& input, const Shape& shape) override {
        if (decodes_ && input.name == "input_ids" && shape[1] != 1) throw Error("The profile decodes one token.");
        if (!decodes_ && is_past(input.name) && shape[2] != 0) throw Error("The profile takes an empty cache.");
        shapes_[input.name] = shape;
        has_run_ = false;
    }

    Shape shape_of(const Tensor& output) const override { return output_shape(output, shapes_); }

    void bind(const Tensor& tensor, void* address) override { addresses_[tensor.name] = address; }

    bool enqueue(const Stream&) override {
        if (emulated::is_recording() && !has_run_) return false;
        has_run_ = true;
        emulated::enqueue([this, shapes = shapes_, addresses = addresses_] { run(shapes, addresses); });
        return true;
    }

private:
    static Shape output_shape(const Tensor& output, const std::map<std::string, Shape>& shapes) {
        Shape shape = output.shape;
        const Shape& ids = shapes.at("input_ids");
        shape[0] = ids[0];
        if (is_present(output.name)) {
            shape[2] = shapes.at(past_name(output.name))[2] + ids[1];
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
            const Shape shape = tensor.is_input ? shapes.at(tensor.name) : output_shape(tensor, shapes);
            std::size_t bytes = tensor.type == Element::kInt64 ? 8 : tensor.type == Element::kFloat32 ? 4 : 2;
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
    Shape at_most(const Tensor& input, bool) const override {
        return {4, input.shape[1], kMostTokens - 1, input.shape[3]};
    }
    std::string last_error() const override { return "emulated"; }

private:
    void add(const char* name, const Ort::TypeInfo& info, bool is_input) {
        const auto tensor = info.GetTensorTypeAndShapeInfo();
        const auto type = tensor.GetElementType();
        const Element element = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64   ? Element::kInt64
                                : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? Element::kFloat32
                                                                              : Element::kFloat16;
        model_.tensors.push_back({name, element, tensor.GetShape(), is_input});
    }

    mutable Model model_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Folder& folder, const std::string& name) {
    return std::make_unique<EmulatedEngine>(folder.engine(name));
}

}  // namespace teamlora
