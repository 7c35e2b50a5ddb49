// `teamlora::MixedExpertProjection` as a TensorRT plugin (IPluginV3, TensorRT 10 and 11).
//
// Weights are inputs, so that engine refit can exchange an adapter. Of version 2 they are slots, which the engine's own
// inputs may be, and the input `adapter` has the slot of each row: neither is read by the host. The plugin holds the
// attributes alone; every size comes from the shapes of its inputs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "mixed_expert.h"

namespace teamlora {

struct Attributes {
    int32_t num_experts = 0;
    int32_t shared_down = 0;
    std::vector<int32_t> out_splits;
};

// IPluginV3OneBuildV2, which can say that an output is an input's memory, came with TensorRT 10.3.
#if NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 3)
#define TEAMLORA_ALIASED_OUTPUT 1
using BuildCapability = nvinfer1::IPluginV3OneBuildV2;
#else
#define TEAMLORA_ALIASED_OUTPUT 0
using BuildCapability = nvinfer1::IPluginV3OneBuild;
#endif

class MixedExpertPlugin final : public nvinfer1::IPluginV3,
                                public nvinfer1::IPluginV3OneCore,
                                public BuildCapability,
                                public nvinfer1::IPluginV3OneRuntime {
public:
    MixedExpertPlugin(std::string node, Attributes attributes);
    // The stored fields point into the object itself; `clone` makes another.
    MixedExpertPlugin(const MixedExpertPlugin&) = delete;
    MixedExpertPlugin& operator=(const MixedExpertPlugin&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const nvinfer1::AsciiChar* getPluginName() const noexcept override;
    const nvinfer1::AsciiChar* getPluginVersion() const noexcept override;
    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, const nvinfer1::DataType* inputTypes,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs, const nvinfer1::DimsExprs* shapeInputs,
                            int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t nbOutputs) const noexcept override;
#if TEAMLORA_ALIASED_OUTPUT
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;
#endif

    // IPluginV3OneRuntime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nbInputs, const nvinfer1::PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc, const nvinfer1::PluginTensorDesc* outputDesc,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    // Whether so many inputs go with a `down` of these sizes; otherwise logged.
    bool fits(int32_t count, const nvinfer1::Dims& down) const noexcept;
    // Sizes of a call, or nullopt, logged, where the inputs and the output do not belong together. `dims` are of x,
    // base, down, mix, up and y; `adapter` is null where there are no slots.
    std::optional<MixedExpertShape> shape_of(nvinfer1::DataType type, const nvinfer1::Dims* dims,
                                             const nvinfer1::Dims* adapter) const noexcept;
    // The same for the most that a profile allows.
    std::optional<MixedExpertShape> largest_shape_of(const nvinfer1::DynamicPluginTensorDesc* in) const noexcept;
    std::optional<MixedExpertShape> shape_of(const nvinfer1::PluginTensorDesc* in,
                                             const nvinfer1::PluginTensorDesc* out) const noexcept;

    std::string node_;
    Attributes attributes_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection serialized_{};
};

}  // namespace teamlora
