// What leaves the library: TensorRT's entry points, and a description for `teamlora-export plugins info`.
#include <atomic>
#include <cstdio>

#include <NvInferRuntime.h>

#include "../op.h"
#include "logging.h"
#include "registration.h"

#define TEAMLORA_TEXT(value) #value
#define TEAMLORA_NUMBER(value) TEAMLORA_TEXT(value)

namespace teamlora {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(const std::string& node, const std::string& message) noexcept {
    try {
        const std::string text = std::string(kOpDomain) + "::" + kOpName + " " + node + ": " + message;
        nvinfer1::ILoggerFinder* finder = logger_finder;
        nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
        if (logger != nullptr) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
        } else {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {
        // Out of memory while reporting an error: the error code still says that there was one.
    }
}

}  // namespace teamlora

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { teamlora::set_logger_finder(finder); }

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&teamlora::creator()};
    nbCreators = teamlora::hand_over_creator() ? 1 : 0;
    return creators;
}

// JSON; needs neither TensorRT nor a GPU.
extern "C" const char* teamlora_plugin_info() {
    static const std::string info =
        std::string("{\"op\": \"") + teamlora::kOpDomain + "::" + teamlora::kOpName +
        "\", \"op_version\": " + teamlora::kOpAdaptersVersionText + ", \"attributes\": [\"" +
        teamlora::kOpAttributes[0] + "\", \"" + teamlora::kOpAttributes[1] + "\", \"" + teamlora::kOpAttributes[2] +
        "\"], \"tensorrt\": \"" TEAMLORA_NUMBER(NV_TENSORRT_MAJOR) "." TEAMLORA_NUMBER(
            NV_TENSORRT_MINOR) "." TEAMLORA_NUMBER(NV_TENSORRT_PATCH) "\"" +
        ", \"cuda\": \"" TEAMLORA_CUDA_VERSION "\", \"architectures\": \"" TEAMLORA_ARCHITECTURES
        "\", \"build\": \"" TEAMLORA_BUILD_ID "\"}";
    return info.c_str();
}
