#include "plugin.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <utility>

#include "../op.h"
#include "logging.h"

namespace teamlora {
namespace {

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

enum Input { kX, kBase, kDown, kMix, kUp, kNumInputs, kAdapter = kNumInputs };

// Version 2 of the op has one more.
bool takes_inputs(int32_t count) noexcept { return count == kNumInputs || count == kNumInputs + 1; }

// Whether there are slots: `enqueue` is not told how many inputs there are.
bool has_slots(const Dims& down) noexcept { return down.nbDims == 3; }

std::optional<DataType> to_kernel_type(nvinfer1::DataType type) noexcept {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return DataType::kFloat32;
        case nvinfer1::DataType::kHALF:
            return DataType::kFloat16;
        case nvinfer1::DataType::kBF16:
            return DataType::kBFloat16;
        default:
            return std::nullopt;
    }
}

std::string to_text(const Dims& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    return text + "]";
}

bool same_leading(const Dims& a, const Dims& b) noexcept {
    return a.nbDims == b.nbDims && a.nbDims >= 1 && std::equal(a.d, a.d + a.nbDims - 1, b.d);
}

}  // namespace

MixedExpertPlugin::MixedExpertPlugin(std::string node, Attributes attributes)
    : node_(std::move(node)), attributes_(std::move(attributes)) {
    using nvinfer1::PluginFieldType;
    const auto& splits = attributes_.out_splits;
    fields_ = {{kOpAttributes[0], &attributes_.num_experts, PluginFieldType::kINT32, 1},
               {kOpAttributes[1], &attributes_.shared_down, PluginFieldType::kINT32, 1},
               {kOpAttributes[2], splits.data(), PluginFieldType::kINT32, static_cast<int32_t>(splits.size())}};
    serialized_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginCapability* MixedExpertPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<BuildCapability*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* MixedExpertPlugin::clone() noexcept {
    try {
        return std::make_unique<MixedExpertPlugin>(node_, attributes_).release();
    } catch (const std::exception& error) {
        log_error(node_, error.what());
        return nullptr;
    }
}

const nvinfer1::AsciiChar* MixedExpertPlugin::getPluginName() const noexcept { return kOpName; }
const nvinfer1::AsciiChar* MixedExpertPlugin::getPluginVersion() const noexcept { return kOpVersionText; }
const nvinfer1::AsciiChar* MixedExpertPlugin::getPluginNamespace() const noexcept { return ""; }

int32_t MixedExpertPlugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                                              const nvinfer1::DataType* inputTypes, int32_t nbInputs) const noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1) {
        log_error(node_, "takes 5 inputs (x, base, down, mix, up), or adapter too, and gives 1 output, not " +
                             std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
        return -1;
    }
    outputTypes[0] = inputTypes[kBase];
    return 0;
}

int32_t MixedExpertPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs,
                                           const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                           int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1 || inputs[kX].nbDims != inputs[kBase].nbDims ||
        inputs[kX].nbDims < 1) {
        log_error(node_, "x and base must have the same number of dimensions, at least one");
        return -1;
    }
    outputs[0] = inputs[kBase];
    return 0;
}

bool MixedExpertPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                                  int32_t nbOutputs) noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs) return false;
    const PluginTensorDesc& tensor = inOut[pos].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (pos == kAdapter && pos < nbInputs) return tensor.type == nvinfer1::DataType::kINT32;
    if (pos == kMix) return tensor.type == nvinfer1::DataType::kFLOAT;
    return to_kernel_type(tensor.type).has_value() && tensor.type == inOut[kX].desc.type;
}

int32_t MixedExpertPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                           const DynamicPluginTensorDesc*, int32_t nbOutputs) noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1) return -1;
    return fits(nbInputs, in[kDown].desc.dims) && largest_shape_of(in) ? 0 : -1;
}

size_t MixedExpertPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                                           const DynamicPluginTensorDesc*, int32_t nbOutputs) const noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1 || !fits(nbInputs, inputs[kDown].desc.dims)) return 0;
    const auto shape = largest_shape_of(inputs);
    return shape ? workspace_bound(*shape) : 0;
}

#if TEAMLORA_ALIASED_OUTPUT
int32_t MixedExpertPlugin::getAliasedInput(int32_t outputIndex) noexcept { return outputIndex == 0 ? kBase : -1; }
#endif

int32_t MixedExpertPlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                                         int32_t nbOutputs) noexcept {
    if (!takes_inputs(nbInputs) || nbOutputs != 1) return -1;
    return fits(nbInputs, in[kDown].dims) && shape_of(in, out) ? 0 : -1;
}

int32_t MixedExpertPlugin::enqueue(const PluginTensorDesc* inputDesc, const PluginTensorDesc* outputDesc,
                                   const void* const* inputs, void* const* outputs, void* workspace,
                                   cudaStream_t stream) noexcept {
    const auto shape = shape_of(inputDesc, outputDesc);
    if (!shape) return -1;
    if (shape->tokens == 0) return 0;
    const MixedExpertTensors tensors{inputs[kX],
                                     inputs[kBase],
                                     inputs[kDown],
                                     static_cast<const float*>(inputs[kMix]),
                                     inputs[kUp],
                                     outputs[0],
                                     shape->slots > 0 ? static_cast<const int32_t*>(inputs[kAdapter]) : nullptr};
    Tuning tuning;
    cudaError_t error = tuning_of_device(tuning);
    if (error == cudaSuccess) error = launch(*shape, tuning, tensors, workspace, stream);
    if (error == cudaSuccess) return 0;
    log_error(node_, "its kernels could not be launched: " + std::string(cudaGetErrorString(error)));
    return -1;
}

nvinfer1::IPluginV3* MixedExpertPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    // The device is asked now: the first step may be one that is captured. It tells its own errors.
    Tuning tuning;
    static_cast<void>(tuning_of_device(tuning));
    return clone();
}

const nvinfer1::PluginFieldCollection* MixedExpertPlugin::getFieldsToSerialize() noexcept { return &serialized_; }

std::optional<MixedExpertShape> MixedExpertPlugin::shape_of(const PluginTensorDesc* in,
                                                            const PluginTensorDesc* out) const noexcept {
    for (const int input : {kX, kBase, kDown, kMix, kUp}) {
        const nvinfer1::DataType expected = input == kMix ? nvinfer1::DataType::kFLOAT : in[kX].type;
        if (in[input].type != expected || in[input].format != nvinfer1::TensorFormat::kLINEAR) {
            log_error(node_,
                      std::string(kOpInputs[input]) + " has another type or format than the engine was built for");
            return std::nullopt;
        }
    }
    const bool slots = has_slots(in[kDown].dims);
    if (slots &&
        (in[kAdapter].type != nvinfer1::DataType::kINT32 || in[kAdapter].format != nvinfer1::TensorFormat::kLINEAR)) {
        log_error(node_, "adapter has another type or format than the engine was built for");
        return std::nullopt;
    }
    if (out[0].type != in[kX].type || out[0].format != nvinfer1::TensorFormat::kLINEAR) {
        log_error(node_, "y has another type or format than x");
        return std::nullopt;
    }
    const Dims dims[] = {in[kX].dims, in[kBase].dims, in[kDown].dims, in[kMix].dims, in[kUp].dims, out[0].dims};
    return shape_of(in[kX].type, dims, slots ? &in[kAdapter].dims : nullptr);
}

std::optional<MixedExpertShape> MixedExpertPlugin::largest_shape_of(const DynamicPluginTensorDesc* in) const noexcept {
    // Upper bounds of x and base may have been found in different ways: the wider one counts.
    Dims x = in[kX].max, base = in[kBase].max;
    if (x.nbDims == base.nbDims) {
        for (int32_t i = 0; i + 1 < x.nbDims; ++i) x.d[i] = base.d[i] = std::max(x.d[i], base.d[i]);
    }
    const Dims dims[] = {x, base, in[kDown].max, in[kMix].max, in[kUp].max, base};
    if (!has_slots(in[kDown].max)) return shape_of(in[kX].desc.type, dims, nullptr);
    Dims adapter = in[kAdapter].max;
    if (adapter.nbDims == 1 && adapter.d[0] > 1) adapter.d[0] = x.d[0];
    return shape_of(in[kX].desc.type, dims, &adapter);
}

bool MixedExpertPlugin::fits(int32_t count, const Dims& down) const noexcept {
    if ((count > kNumInputs) == has_slots(down)) return true;
    log_error(node_, "down is " + to_text(down) + ": slots of adapters belong to the input adapter, and it to them");
    return false;
}

std::optional<MixedExpertShape> MixedExpertPlugin::shape_of(nvinfer1::DataType type, const Dims* dims,
                                                            const Dims* adapter) const noexcept {
    const Dims &x = dims[kX], &base = dims[kBase], &down = dims[kDown], &mix = dims[kMix], &up = dims[kUp],
               &y = dims[kNumInputs];
    const auto refuse = [&](const std::string& reason) {
        log_error(node_, reason + ": x " + to_text(x) + ", base " + to_text(base) + ", down " + to_text(down) +
                             ", mix " + to_text(mix) + ", up " + to_text(up) + ", y " + to_text(y) +
                             (adapter != nullptr ? ", adapter " + to_text(*adapter) : ""));
        return std::nullopt;
    };
    const auto dtype = to_kernel_type(type);
    if (!dtype) return refuse("x is none of float32, float16, bfloat16");
    // Of an adapter's own sizes, the first is behind that of the slots.
    const int32_t first = adapter != nullptr ? 1 : 0;
    if (!same_leading(x, base) || !same_leading(base, y) || down.nbDims != first + 2 || mix.nbDims != first + 3 ||
        up.nbDims != first + 2) {
        return refuse("the inputs' dimensions do not belong together");
    }
    const auto siblings = static_cast<int32_t>(attributes_.out_splits.size());
    const int32_t k = attributes_.num_experts;
    if (siblings < 1 || siblings > kMaxSiblings || k < 1) return refuse("wrong attributes");
    MixedExpertShape shape;
    shape.dtype = *dtype;
    shape.tokens = 1;
    for (int32_t i = 0; i + 1 < x.nbDims; ++i) shape.tokens *= x.d[i];
    shape.in = static_cast<int32_t>(down.d[first + 1]);
    shape.num_experts = k;
    shape.expert_rank = static_cast<int32_t>(up.d[first]) / k;
    shape.shared_down = attributes_.shared_down != 0;
    shape.num_siblings = siblings;
    std::copy(attributes_.out_splits.begin(), attributes_.out_splits.end(), shape.out_splits);
    if (adapter != nullptr) {
        const bool one_for_all = adapter->nbDims == 1 && adapter->d[0] == 1;
        if (x.nbDims != 3 || adapter->nbDims != 1 || (!one_for_all && adapter->d[0] != x.d[0])) {
            return refuse("there must be an index for each row of [batch, tokens, in], or one for all");
        }
        if (down.d[0] < 1 || down.d[0] > INT32_MAX || mix.d[0] != down.d[0] || up.d[0] != down.d[0]) {
            return refuse("down, mix and up have different numbers of slots");
        }
        shape.slots = static_cast<int32_t>(down.d[0]);
        shape.row_tokens = one_for_all ? shape.tokens : x.d[1];
    }
    if (const char* reason = unsupported(shape)) return refuse(reason);
    const int32_t out = shape.out();
    const auto *of_mix = mix.d + first, *of_up = up.d + first;
    if (x.d[x.nbDims - 1] != shape.in || base.d[base.nbDims - 1] != out || y.d[y.nbDims - 1] != out ||
        of_up[1] != out || of_up[0] != shape.up_rank() || down.d[first] != shape.rows() || of_mix[0] != siblings ||
        of_mix[1] != k || of_mix[2] != k) {
        return refuse("the inputs' sizes do not belong together (num_experts " + std::to_string(k) + ")");
    }
    return shape;
}

}  // namespace teamlora
