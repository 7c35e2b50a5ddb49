// What ONNX Runtime looks up when it loads the library, and what the library says of itself.
#include <string>

#include "../kernels/cpu/code.h"
#include "op.h"

namespace teamlora {
namespace {

std::string list(const char* const* begin, const char* const* end) {
    std::string text;
    for (; begin != end; ++begin) text += (text.empty() ? "\"" : ", \"") + std::string(*begin) + "\"";
    return "[" + text + "]";
}

std::string describe() {
    std::vector<const char*> codes;
    for (const cpu::Code* code : cpu::available_codes()) codes.push_back(code->name);
    return std::string("{\"op\": \"") + kOpDomain + "::" + kOpName + "\", \"op_version\": " + kOpVersionText +
           ", \"attributes\": " + list(std::begin(kOpAttributes), std::end(kOpAttributes)) +
           ", \"onnxruntime_api\": " + std::to_string(ORT_API_VERSION) + ", \"processor\": \"" TEAMLORA_PROCESSOR +
           "\", \"instructions\": " + list(codes.data(), codes.data() + codes.size()) +
           ", \"build\": \"" TEAMLORA_BUILD_ID "\"}";
}

// A status in the words of an ONNX Runtime that is older than the headers of this library.
OrtStatus* refuse(const OrtApiBase* base) {
    const std::string why = "libteamlora_onnxruntime needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                            " or newer, this is " + base->GetVersionString() + ".";
    for (uint32_t version = ORT_API_VERSION - 1; version > 0; --version) {
        const OrtApi* older = base->GetApi(version);
        if (older != nullptr) return older->CreateStatus(ORT_FAIL, why.c_str());
    }
    return nullptr;
}

}  // namespace
}  // namespace teamlora

#define TEAMLORA_EXPORTED __attribute__((visibility("default")))

extern "C" {

TEAMLORA_EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* raw, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) return teamlora::refuse(base);
    Ort::InitApi(api);
    try {
        static const teamlora::MixedExpertOp ops[] = {
            teamlora::MixedExpertOp(teamlora::cpu::DataType::kFloat32),
            teamlora::MixedExpertOp(teamlora::cpu::DataType::kFloat16),
            teamlora::MixedExpertOp(teamlora::cpu::DataType::kBFloat16),
        };
        Ort::CustomOpDomain domain(teamlora::kOpDomain);
        for (const teamlora::MixedExpertOp& op : ops) domain.Add(&op);
        Ort::UnownedSessionOptions options(raw);
        options.Add(domain);
        // The options only point to it, and sessions that use them may be made at any time.
        domain.release();
        return nullptr;
    } catch (const std::exception& error) {
        return api->CreateStatus(ORT_FAIL, error.what());
    }
}

// JSON: the op, its version and attributes, the ONNX Runtime API and processor that it is built for, the instruction
// sets that this processor runs of it, the build.
TEAMLORA_EXPORTED const char* teamlora_library_info() {
    static const std::string text = teamlora::describe();
    return text.c_str();
}
}
