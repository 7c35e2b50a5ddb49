#include "tensorrt_engine.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>

namespace teamlora {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

// Keeps the last error, which TensorRT's calls do not return.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        last_ = message;
    }
    std::string last() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_.empty() ? "it gave no reason" : last_;
    }

private:
    mutable std::mutex mutex_;
    std::string last_;
};

Shape to_shape(const Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

std::string text_of(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) text += (text.size() == 1 ? "" : ", ") + std::to_string(size);
    return text + "]";
}

Element to_element(const std::string& tensor, DataType type) {
    switch (type) {
        case DataType::kINT64:
            return Element::kInt64;
        case DataType::kINT32:
            return Element::kInt32;
        case DataType::kFLOAT:
            return Element::kFloat32;
        case DataType::kHALF:
            return Element::kFloat16;
        case DataType::kBF16:
            return Element::kBfloat16;
        default:
            throw Error("The engine's " + tensor + " is of a type that this program does not know.");
    }
}

std::vector<char> read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<char> content(file ? static_cast<std::size_t>(file.tellg()) : 0);
    file.seekg(0);
    if (!file.read(content.data(), static_cast<std::streamsize>(content.size())) || content.empty()) {
        throw Error(path.string() + ": cannot be read.");
    }
    return content;
}

// Opens the plugin, which registers itself; engines refer to it for good. A process has one build of it, since its
// registry takes no second of a name, and an engine runs with the build that it was made with.
void load_plugin(const std::filesystem::path& path) {
    static std::mutex mutex;
    static std::string loaded;
    const std::lock_guard<std::mutex> lock(mutex);
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    using Describe = const char*();
    auto* describe = library != nullptr ? reinterpret_cast<Describe*>(dlsym(library, "teamlora_plugin_info")) : nullptr;
    if (describe == nullptr) throw Error(path.string() + ": cannot be loaded as a plugin: " + dlerror() + ".");
    const std::string headers = nlohmann::json::parse(describe()).at("tensorrt").get<std::string>();
    if (std::stoi(headers) != getInferLibMajorVersion()) {
        throw Error(path.string() + ": was built with the headers of TensorRT " + headers + ", and this is " +
                    std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) +
                    ". Build plugin and engine with this version.");
    }
    if (!loaded.empty() && loaded != describe()) {
        throw Error(path.string() + ": this process has another build of the plugin. Open this model in another.");
    }
    if (getPluginRegistry()->getCreator("MixedExpertProjection", "1", "") == nullptr) {
        throw Error(path.string() + ": TensorRT has not taken the plugin.");
    }
    loaded = describe();
}

class TensorRTContext : public Context {
public:
    TensorRTContext(std::unique_ptr<nvinfer1::IExecutionContext> context, const nvinfer1::ICudaEngine& engine,
                    const Logger& logger)
        : context_(std::move(context)), engine_(engine), logger_(logger) {}

    void set_shape(const Tensor& input, const Shape& shape) override {
        const char* name = input.name.c_str();
        Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        if (context_->setInputShape(name, dims)) return;
        const int profile = context_->getOptimizationProfile();
        const auto limit = [&](OptProfileSelector which) {
            return text_of(to_shape(engine_.getProfileShape(name, profile, which)));
        };
        throw Error("The engine was built for " + input.name + " from " + limit(OptProfileSelector::kMIN) + " to " +
                    limit(OptProfileSelector::kMAX) + ", this request needs " + text_of(shape) +
                    ". Build it with other --shapes.");
    }

    Shape shape_of(const Tensor& output) const override {
        return to_shape(context_->getTensorShape(output.name.c_str()));
    }

    void bind(const Tensor& tensor, void* address) override {
        if (!context_->setTensorAddress(tensor.name.c_str(), address)) {
            throw Error("TensorRT does not take the address of " + tensor.name + ": " + logger_.last() + ".");
        }
    }

    bool enqueue(const Stream& stream) override { return context_->enqueueV3(stream.get()); }

private:
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    const nvinfer1::ICudaEngine& engine_;
    const Logger& logger_;
};

class TensorRTEngine : public Engine {
public:
    TensorRTEngine(const Folder& folder, const std::string& name) : path_(folder.engine(name)) {
        if (std::filesystem::is_regular_file(folder.plugin())) load_plugin(folder.plugin());
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "TensorRT runs on a GPU, and none can be used here");
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw Error("TensorRT cannot be started: " + logger_.last() + ".");
        const std::vector<char> plan = read_file(path_);
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_) {
            throw Error(path_.string() + ": this TensorRT (" + std::to_string(getInferLibVersion()) +
                        ") or this GPU cannot run it: " + logger_.last() +
                        ". Build it here with `teamlora-export trt`.");
        }
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* tensor = engine_->getIOTensorName(i);
            tensors_.push_back({tensor, to_element(tensor, engine_->getTensorDataType(tensor)),
                                to_shape(engine_->getTensorShape(tensor)),
                                engine_->getTensorIOMode(tensor) == nvinfer1::TensorIOMode::kINPUT});
        }
    }

    const std::vector<Tensor>& tensors() const override { return tensors_; }
    std::string last_error() const override { return logger_.last(); }

    std::unique_ptr<Context> context(bool last, const Stream& stream) const override {
        const std::lock_guard<std::mutex> lock(mutex_);
        // Memory for the profile that is chosen, not for the largest of all.
        std::unique_ptr<nvinfer1::IExecutionContext> made(
            engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
        if (!made || !made->setOptimizationProfileAsync(profile(last), stream.get())) {
            throw Error(path_.string() + ": no context for it: " + logger_.last() + ".");
        }
        return std::make_unique<TensorRTContext>(std::move(made), *engine_, logger_);
    }

    Shape at_most(const Tensor& input, bool last) const override {
        return to_shape(engine_->getProfileShape(input.name.c_str(), profile(last), OptProfileSelector::kMAX));
    }

private:
    int profile(bool last) const { return last ? engine_->getNbOptimizationProfiles() - 1 : 0; }

    std::filesystem::path path_;
    Logger logger_;
    mutable std::mutex mutex_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::vector<Tensor> tensors_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Folder& folder, const std::string& name) {
    return std::make_unique<TensorRTEngine>(folder, name);
}

}  // namespace teamlora
