// What ONNX Runtime looks up when it loads the library, and what the library says of itself.
#include <iterator>
#include <string>
#include <vector>

#include "op.h"

// Which providers it is for; one library is for all that a session has, since a session takes a domain from one alone.
#if TEAMLORA_CPU
#include "../kernels/cpu/code.h"
#include "cpu_kernel.h"
#endif
#if TEAMLORA_CUDA
#include "cuda_kernel.h"
#else
#define TEAMLORA_CUDA_VERSION ""
#define TEAMLORA_ARCHITECTURES ""
#endif

namespace teamlora {
namespace {

std::string list(const char* const* begin, const char* const* end) {
    std::string text;
    for (; begin != end; ++begin) text += (text.empty() ? "\"" : ", \"") + std::string(*begin) + "\"";
    return "[" + text + "]";
}

std::string describe() {
    std::vector<const char*> codes;
#if TEAMLORA_CPU
    for (const cpu::Code* code : cpu::available_codes()) codes.push_back(code->name);
#endif
    return std::string("{\"op\": \"") + kOpDomain + "::" + kOpName + "\", \"op_version\": " + kOpVersionText +
           ", \"attributes\": " + list(std::begin(kOpAttributes), std::end(kOpAttributes)) +
           ", \"onnxruntime_api\": " + std::to_string(ORT_API_VERSION) + ", \"processor\": \"" TEAMLORA_PROCESSOR +
           "\", \"instructions\": " + list(codes.data(), codes.data() + codes.size()) +
           ", \"cuda\": \"" TEAMLORA_CUDA_VERSION "\", \"architectures\": \"" TEAMLORA_ARCHITECTURES
           "\", \"build\": \"" TEAMLORA_BUILD_ID "\"}";
}

// A status in the words of an ONNX Runtime that is older than the headers of this library.
OrtStatus* too_old(const OrtApiBase* base) {
    const std::string why = "libteamlora_onnxruntime needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                            " or newer, this is " + base->GetVersionString() + ".";
    for (uint32_t version = ORT_API_VERSION - 1; version > 0; --version) {
        const OrtApi* older = base->GetApi(version);
        if (older != nullptr) return older->CreateStatus(ORT_FAIL, why.c_str());
    }
    return nullptr;
}

template <class Kernel>
void add_ops(Ort::CustomOpDomain& domain) {
    static const MixedExpertOp<Kernel> ops[] = {
        MixedExpertOp<Kernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT),
        MixedExpertOp<Kernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16),
        MixedExpertOp<Kernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16),
    };
    for (const MixedExpertOp<Kernel>& op : ops) domain.Add(&op);
}

// Weights of 16 bits beside float32.
template <class Kernel>
void add_narrow_ops(Ort::CustomOpDomain& domain) {
    static const MixedExpertOp<Kernel> ops[] = {
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
        {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
    };
    for (const MixedExpertOp<Kernel>& op : ops) domain.Add(&op);
}

}  // namespace
}  // namespace teamlora

#define TEAMLORA_EXPORTED __attribute__((visibility("default")))

extern "C" {

TEAMLORA_EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* raw, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) return teamlora::too_old(base);
    Ort::InitApi(api);
    try {
        Ort::CustomOpDomain domain(teamlora::kOpDomain);
#if TEAMLORA_CPU
        teamlora::add_ops<teamlora::CpuKernel>(domain);
        teamlora::add_narrow_ops<teamlora::CpuKernel>(domain);
#endif
#if TEAMLORA_CUDA
        teamlora::add_ops<teamlora::CudaKernel>(domain);
#endif
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
// sets that this processor runs of it, the CUDA compiler and its GPUs (empty without), the build.
TEAMLORA_EXPORTED const char* teamlora_library_info() {
    static const std::string text = teamlora::describe();
    return text.c_str();
}
}
