#include "creator.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "../op.h"
#include "logging.h"
#include "plugin.h"

namespace teamlora {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// The integers of a field. ONNX parsers hand an attribute over as 32 or as 64 bits, by their version.
std::vector<int32_t> integers(const PluginField& field) {
    std::vector<int32_t> values(static_cast<size_t>(field.length));
    for (int32_t i = 0; i < field.length; ++i) {
        int64_t value = 0;
        if (field.type == PluginFieldType::kINT64) {
            value = static_cast<const int64_t*>(field.data)[i];
        } else if (field.type == PluginFieldType::kINT32) {
            value = static_cast<const int32_t*>(field.data)[i];
        } else {
            throw std::invalid_argument("is not made of integers");
        }
        if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
            throw std::invalid_argument("holds " + std::to_string(value));
        }
        values[i] = static_cast<int32_t>(value);
    }
    return values;
}

const PluginField& find(const nvinfer1::PluginFieldCollection& fields, const char* name) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& field = fields.fields[i];
        if (std::strcmp(field.name, name) == 0 && field.data != nullptr && field.length > 0) return field;
    }
    throw std::invalid_argument("is missing");
}

std::vector<int32_t> read(const nvinfer1::PluginFieldCollection& fields, const char* name, size_t least, size_t most) {
    try {
        std::vector<int32_t> values = integers(find(fields, name));
        if (values.size() < least || values.size() > most) {
            throw std::invalid_argument("has " + std::to_string(values.size()) + " elements");
        }
        return values;
    } catch (const std::invalid_argument& error) {
        throw std::invalid_argument("attribute " + std::string(name) + " " + error.what());
    }
}

Attributes read_attributes(const nvinfer1::PluginFieldCollection& fields) {
    Attributes attributes;
    attributes.num_experts = read(fields, kOpAttributes[0], 1, 1)[0];
    attributes.shared_down = read(fields, kOpAttributes[1], 1, 1)[0];
    attributes.out_splits = read(fields, kOpAttributes[2], 1, kMaxSiblings);
    if (attributes.num_experts < 1 || attributes.num_experts > kMaxExperts) {
        throw std::invalid_argument("attribute num_experts is " + std::to_string(attributes.num_experts) +
                                    ", the kernels take 1 to " + std::to_string(kMaxExperts));
    }
    if (attributes.shared_down > 1) throw std::invalid_argument("attribute shared_down is neither 0 nor 1");
    if (std::count(attributes.out_splits.begin(), attributes.out_splits.end(), 0) > 0) {
        throw std::invalid_argument("attribute out_splits holds 0");
    }
    return attributes;
}

}  // namespace

MixedExpertCreator::MixedExpertCreator() {
    fields_ = {{kOpAttributes[0], nullptr, PluginFieldType::kINT32, 1},
               {kOpAttributes[1], nullptr, PluginFieldType::kINT32, 1},
               {kOpAttributes[2], nullptr, PluginFieldType::kINT32, kMaxSiblings}};
    names_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* MixedExpertCreator::createPlugin(const nvinfer1::AsciiChar* name,
                                                      const nvinfer1::PluginFieldCollection* fc,
                                                      nvinfer1::TensorRTPhase) noexcept {
    const char* node = name != nullptr ? name : "";
    try {
        if (fc == nullptr) throw std::invalid_argument("has no attributes");
        return std::make_unique<MixedExpertPlugin>(node, read_attributes(*fc)).release();
    } catch (const std::exception& error) {
        log_error(node, error.what());
        return nullptr;
    }
}

const nvinfer1::PluginFieldCollection* MixedExpertCreator::getFieldNames() noexcept { return &names_; }
const nvinfer1::AsciiChar* MixedExpertCreator::getPluginName() const noexcept { return kOpName; }
const nvinfer1::AsciiChar* MixedExpertCreator::getPluginVersion() const noexcept { return kOpVersionText; }
const nvinfer1::AsciiChar* MixedExpertCreator::getPluginNamespace() const noexcept { return ""; }

}  // namespace teamlora
