// Makes plugins from the attributes of an ONNX node, or from the fields that an engine stored.
#pragma once

#include <vector>

#include <NvInferRuntime.h>

namespace teamlora {

class MixedExpertCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    MixedExpertCreator();

    nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name, const nvinfer1::PluginFieldCollection* fc,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    const nvinfer1::AsciiChar* getPluginName() const noexcept override;
    const nvinfer1::AsciiChar* getPluginVersion() const noexcept override;
    const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override;

private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection names_{};
};

}  // namespace teamlora
