// Drives the plugin through its own interfaces as TensorRT does, without TensorRT and without a GPU.
//
//     life_cycle LIBRARY runs|fails      whether its kernels can be launched here: emulated ones can, a GPU's cannot
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "../op.h"

namespace {

using namespace nvinfer1;  // NOLINT: this file is about nothing else

int passed = 0, failed = 0;

void check(bool holds, const char* what) {
    (holds ? passed : failed) += 1;
    if (!holds) std::printf("FAILED: %s\n", what);
}

class Log final : public ILogger {
public:
    void log(Severity severity, const AsciiChar* message) noexcept override {
        if (severity == Severity::kERROR) last = message;
    }
    // Whether the last error names `text`; forgets it.
    bool tells(const char* text) {
        const bool found = last.find(text) != std::string::npos;
        if (!found) std::printf("  the log says: %s\n", last.c_str());
        last.clear();
        return found;
    }
    std::string last;
} the_log;

class Finder final : public ILoggerFinder {
public:
    ILogger* findLogger() override { return &the_log; }
} the_finder;

class Expressions final : public IExprBuilder {};

struct Library {
    explicit Library(const char* path) : handle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (handle == nullptr) {
            std::printf("%s\n", dlerror());
            std::exit(2);
        }
    }
    template <typename Function>
    Function* find(const char* name) const {
        return reinterpret_cast<Function*>(dlsym(handle, name));
    }
    void* handle;
};

Dims dims(std::vector<int64_t> sizes) {
    Dims made{};
    made.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), made.d);
    return made;
}

PluginTensorDesc tensor(std::vector<int64_t> sizes, DataType type = DataType::kHALF) {
    PluginTensorDesc made{};
    made.dims = dims(std::move(sizes));
    made.type = type;
    made.format = TensorFormat::kLINEAR;
    return made;
}

// x, base, down, mix, up, y of q/k/v with 4 experts of rank 2: out 64 + 32 + 32.
std::vector<PluginTensorDesc> tensors(int64_t batch, int64_t sequence, DataType type = DataType::kHALF) {
    return {tensor({batch, sequence, 64}, type),
            tensor({batch, sequence, 128}, type),
            tensor({36, 64}, type),
            tensor({3, 4, 4}, DataType::kFLOAT),
            tensor({8, 128}, type),
            tensor({batch, sequence, 128}, type)};
}

std::vector<DynamicPluginTensorDesc> dynamic(DataType type, int64_t most) {
    std::vector<DynamicPluginTensorDesc> made;
    const auto least = tensors(1, 1, type), largest = tensors(1, most, type);
    for (size_t i = 0; i < largest.size(); ++i) {
        DynamicPluginTensorDesc one{};
        one.desc = largest[i];
        one.min = least[i].dims;
        one.max = one.opt = largest[i].dims;
        if (i < 2 || i == 5) one.desc.dims.d[0] = one.desc.dims.d[1] = -1;
        made.push_back(one);
    }
    return made;
}

// The same with three slots of adapters, and an index for each row: x, base, down, mix, up, adapter, y.
std::vector<PluginTensorDesc> with_slots(std::vector<PluginTensorDesc> made, int64_t rows) {
    for (const size_t weight : {2, 3, 4}) {
        Dims& sizes = made[weight].dims;
        std::copy_backward(sizes.d, sizes.d + sizes.nbDims, sizes.d + sizes.nbDims + 1);
        sizes.d[0] = 3;
        ++sizes.nbDims;
    }
    made.insert(made.begin() + 5, tensor({rows}, DataType::kINT32));
    return made;
}

std::vector<DynamicPluginTensorDesc> dynamic_with_slots(int64_t batch, int64_t most) {
    std::vector<DynamicPluginTensorDesc> made;
    const auto least = with_slots(tensors(1, 1), 1), largest = with_slots(tensors(batch, most), batch);
    for (size_t i = 0; i < largest.size(); ++i) {
        DynamicPluginTensorDesc one{};
        one.desc = largest[i];
        one.min = least[i].dims;
        one.max = one.opt = largest[i].dims;
        made.push_back(one);
    }
    return made;
}

struct Fields {
    Fields(std::vector<int64_t> k, std::vector<int64_t> shared, std::vector<int64_t> splits)
        : values{std::move(k), std::move(shared), std::move(splits)} {
        for (size_t i = 0; i < values.size(); ++i) {
            if (values[i].empty()) continue;
            fields.emplace_back(teamlora::kOpAttributes[i], values[i].data(), PluginFieldType::kINT64,
                                static_cast<int32_t>(values[i].size()));
        }
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
    }
    std::vector<std::vector<int64_t>> values;
    std::vector<PluginField> fields;
    PluginFieldCollection collection;
};

struct Capabilities {
    explicit Capabilities(IPluginV3& plugin)
        : core(static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE))),
          build(static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD))),
          runtime(static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME))) {}
    IPluginV3OneCore* core;
    IPluginV3OneBuild* build;
    IPluginV3OneRuntime* runtime;
};

using Plugin = std::unique_ptr<IPluginV3>;

void creation_refuses_wrong_attributes(IPluginCreatorV3One& creator) {
    const auto refused = [&](Fields fields, const char* reason, const char* what) {
        const Plugin made(creator.createPlugin("layer0.q", &fields.collection, TensorRTPhase::kBUILD));
        check(made == nullptr && the_log.tells(reason), what);
    };
    refused({{}, {0}, {8}}, "layer0.q: attribute num_experts is missing", "a missing attribute is refused by name");
    refused({{33}, {0}, {8}}, "num_experts is 33", "more experts than the kernels take are refused");
    refused({{0}, {0}, {8}}, "num_experts is 0", "no experts are refused");
    refused({{4}, {0}, {1, 2, 3, 4, 5}}, "out_splits has 5 elements", "five siblings are refused");
    refused({{4}, {0}, {8, 0}}, "out_splits holds 0", "an empty sibling is refused");
    refused({{4}, {2}, {8}}, "shared_down", "shared_down is 0 or 1");
    refused({{4}, {0}, {int64_t{1} << 40}}, "holds 1099511627776", "a width beyond 32 bits is refused");
    check(creator.createPlugin("none", nullptr, TensorRTPhase::kBUILD) == nullptr && the_log.tells("no attributes"),
          "no attributes at all are refused");
    const float wrong = 4;
    PluginField field(teamlora::kOpAttributes[0], &wrong, PluginFieldType::kFLOAT32, 1);
    const PluginFieldCollection collection{1, &field};
    check(creator.createPlugin("wrong", &collection, TensorRTPhase::kBUILD) == nullptr && the_log.tells("integers"),
          "an attribute of another type is refused");
}

void types_and_shapes_follow_the_inputs(const Capabilities& plugin) {
    DataType output{};
    const DataType inputs[] = {DataType::kBF16, DataType::kBF16, DataType::kBF16, DataType::kFLOAT, DataType::kBF16};
    check(plugin.build->getNbOutputs() == 1, "there is one output");
    check(plugin.build->getOutputDataTypes(&output, 1, inputs, 5) == 0 && output == DataType::kBF16,
          "y has base's type");
    check(plugin.build->getOutputDataTypes(&output, 1, inputs, 4) != 0 && the_log.tells("layer0.q"),
          "four inputs are refused");
    // Expressions are only handed on, so addresses will do.
    int symbols[8];
    DimsExprs shapes[5]{}, result{};
    for (int i = 0; i < 5; ++i) {
        shapes[i].nbDims = i == 2 || i == 4 ? 2 : 3;
        for (int d = 0; d < 3; ++d)
            shapes[i].d[d] = reinterpret_cast<const IDimensionExpr*>(&symbols[i == 1 ? d : 4 + d]);
    }
    Expressions expressions;
    const bool done = plugin.build->getOutputShapes(shapes, 5, nullptr, 0, &result, 1, expressions) == 0;
    check(done && result.nbDims == 3 && std::equal(result.d, result.d + 3, shapes[1].d), "y has base's shape");
    shapes[0].nbDims = 2;
    check(plugin.build->getOutputShapes(shapes, 5, nullptr, 0, &result, 1, expressions) != 0 &&
              the_log.tells("dimensions"),
          "x and base of another rank are refused");
}

void formats_are_linear_and_of_one_type(const Capabilities& plugin) {
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        const auto all = dynamic(type, 8);
        bool supported = true;
        for (int pos = 0; pos < 6; ++pos) supported &= plugin.build->supportsFormatCombination(pos, all.data(), 5, 1);
        check(supported, "float32, float16 and bfloat16 are taken");
    }
    auto all = dynamic(DataType::kHALF, 8);
    const auto refused = [&](int pos) { return !plugin.build->supportsFormatCombination(pos, all.data(), 5, 1); };
    all[3].desc.type = DataType::kHALF;
    check(refused(3), "mix is float32 whatever the others are");
    all[4].desc.type = DataType::kFLOAT;
    check(refused(4), "inputs of two types are refused");
    all[0].desc.type = DataType::kINT8;
    check(refused(0), "int8 is refused");
    all = dynamic(DataType::kHALF, 8);
    all[1].desc.format = TensorFormat::kCHW32;
    check(refused(1), "only linear formats are taken");
    check(refused(6) && refused(-1), "there is no seventh tensor");
    check(!plugin.build->supportsFormatCombination(0, all.data(), 4, 1), "four inputs are refused");
}

void configuration_and_workspace(const Capabilities& plugin) {
    auto all = dynamic(DataType::kHALF, 512);
    check(plugin.build->configurePlugin(all.data(), 5, &all[5], 1) == 0, "a profile is accepted");
    const size_t prefill = plugin.build->getWorkspaceSize(all.data(), 5, &all[5], 1);
    auto small = dynamic(DataType::kHALF, 1);
    const size_t decode = plugin.build->getWorkspaceSize(small.data(), 5, &small[5], 1);
    check(decode > 0 && prefill > decode, "the workspace grows with the profile");
    all[2].max.d[0] = 35;
    check(plugin.build->configurePlugin(all.data(), 5, &all[5], 1) != 0 && the_log.tells("down [35, 64]"),
          "a wrong size is refused, with all sizes");
}

void enqueue_refuses_what_it_was_not_built_for(const Capabilities& plugin) {
    auto run = [&](std::vector<PluginTensorDesc> descs) {
        const void* inputs[5] = {};
        void* outputs[1] = {};
        return plugin.runtime->enqueue(descs.data(), &descs[5], inputs, outputs, nullptr, nullptr);
    };
    const auto changed = [&](int at, PluginTensorDesc desc) {
        auto descs = tensors(1, 3);
        descs[at] = desc;
        return run(descs);
    };
    check(run(tensors(0, 5)) == 0, "no tokens are no work");
    check(changed(0, tensor({1, 4, 64})) != 0 && the_log.tells("do not belong together"),
          "x and base of different lengths");
    check(changed(0, tensor({1, 3, 65})) != 0 && the_log.tells("x [1, 3, 65]"), "x of another width");
    check(changed(1, tensor({1, 3, 127})) != 0 && the_log.tells("base"), "base of another width");
    check(changed(2, tensor({36})) != 0 && the_log.tells("dimensions"), "down of another rank");
    check(changed(3, tensor({3, 4, 5}, DataType::kFLOAT)) != 0 && the_log.tells("num_experts 4"),
          "mix of another size");
    check(changed(3, tensor({3, 4, 4})) != 0 && the_log.tells("mix has another type"), "mix of another type");
    check(changed(4, tensor({9, 128})) != 0 && the_log.tells("up [9, 128]"), "up of a rank that k does not divide");
    check(changed(5, tensor({1, 3, 128}, DataType::kFLOAT)) != 0 && the_log.tells("y has another type"),
          "y of another type");
    auto strided = tensor({1, 3, 64});
    strided.format = TensorFormat::kHWC8;
    check(changed(0, strided) != 0 && the_log.tells("format"), "another format");
}

// u is 1 for every expert, the router has no opinion: y = 1 + 8 rows x 1/4 x up.
void enqueue_runs_or_says_why_not(const Capabilities& plugin, bool runs) {
    auto descs = tensors(1, 3);
    const auto filled = [](size_t count, auto value) {
        std::vector<__half> array(count);
        for (size_t i = 0; i < count; ++i) array[i] = __float2half(static_cast<float>(value(i)));
        return array;
    };
    const auto one = [](size_t) { return 1.0; };
    const auto x = filled(3 * 64, one), base = filled(3 * 128, one);
    const auto down = filled(36 * 64, [](size_t i) { return i / 64 % 12 < 8 ? 1.0 / 64 : 0.0; });
    const auto up = filled(8 * 128, [](size_t i) { return i % 128 % 5; });
    std::vector<float> mix(3 * 16, 0.0F);
    for (size_t i = 0; i < mix.size(); ++i) mix[i] = i % 16 % 5 == 0 ? 1.0F : 0.0F;
    std::vector<__half> y(3 * 128, __float2half(-1.0F));
    std::vector<char> workspace(plugin.build->getWorkspaceSize(dynamic(DataType::kHALF, 3).data(), 5, nullptr, 1) +
                                256);
    void* aligned = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256);
    const void* inputs[] = {x.data(), base.data(), down.data(), mix.data(), up.data()};
    void* outputs[] = {y.data()};
    const bool done = plugin.runtime->enqueue(descs.data(), &descs[5], inputs, outputs, aligned, nullptr) == 0;
    if (!runs) {
        check(!done && the_log.tells("could not be launched"), "a failed launch is an error with its reason");
        return;
    }
    bool right = done;
    for (size_t i = 0; i < y.size(); ++i) right &= __half2float(y[i]) == 1.0F + 2.0F * static_cast<float>(i % 128 % 5);
    check(right, "enqueue hands each tensor to the kernels as what it is");
}

void slots_are_taken_with_their_indices(const Capabilities& plugin) {
    DataType output{};
    const DataType inputs[] = {DataType::kHALF,  DataType::kHALF, DataType::kHALF,
                               DataType::kFLOAT, DataType::kHALF, DataType::kINT32};
    check(plugin.build->getOutputDataTypes(&output, 1, inputs, 6) == 0 && output == DataType::kHALF,
          "six inputs are taken");
    auto all = dynamic_with_slots(4, 512);
    bool supported = true;
    for (int pos = 0; pos < 7; ++pos) supported &= plugin.build->supportsFormatCombination(pos, all.data(), 6, 1);
    check(supported, "slots are of the others' type, and the indices int32");
    check(!plugin.build->supportsFormatCombination(7, all.data(), 6, 1), "there is no eighth tensor");
    check(plugin.build->configurePlugin(all.data(), 6, &all[6], 1) == 0, "a profile with slots is accepted");
    check(plugin.build->getWorkspaceSize(all.data(), 6, &all[6], 1) >=
              plugin.build->getWorkspaceSize(dynamic(DataType::kHALF, 512).data(), 5, nullptr, 1),
          "four rows need no less than one");
    check(plugin.build->configurePlugin(all.data(), 5, &all[6], 1) != 0 && the_log.tells("down is [3, 36, 64]"),
          "slots without indices are refused");
    all[5].desc.type = DataType::kINT64;
    check(!plugin.build->supportsFormatCombination(5, all.data(), 6, 1), "indices of another type are refused");
    auto alone = dynamic(DataType::kHALF, 8);
    alone.insert(alone.begin() + 5, all[5]);
    check(plugin.build->configurePlugin(alone.data(), 6, &alone[6], 1) != 0 && the_log.tells("down is [36, 64]"),
          "indices without slots are refused");
    const auto changed = [&](size_t at, PluginTensorDesc desc) {
        auto descs = with_slots(tensors(2, 3), 2);
        descs[at] = desc;
        return plugin.runtime->onShapeChange(descs.data(), 6, &descs[6], 1);
    };
    check(changed(5, tensor({1}, DataType::kINT32)) == 0, "one index for all rows");
    check(changed(5, tensor({3}, DataType::kINT32)) != 0 && the_log.tells("adapter [3]"), "indices of other rows");
    check(changed(5, tensor({2}, DataType::kINT64)) != 0 && the_log.tells("adapter has another type"),
          "indices of another type");
    check(changed(3, tensor({2, 3, 4, 4}, DataType::kFLOAT)) != 0 && the_log.tells("numbers of slots"),
          "slots of another number");
}

// As below, with an adapter for each of four rows: `up` of slot n is n times that of the first. One is without.
void enqueue_runs_slots(const Capabilities& plugin) {
    const auto descs = with_slots(tensors(4, 3), 4);
    const auto filled = [](size_t count, auto value) {
        std::vector<__half> array(count);
        for (size_t i = 0; i < count; ++i) array[i] = __float2half(static_cast<float>(value(i)));
        return array;
    };
    const auto one = [](size_t) { return 1.0; };
    const auto x = filled(12 * 64, one), base = filled(12 * 128, one);
    const auto down = filled(3 * 36 * 64, [](size_t i) { return i / 64 % 12 < 8 ? 1.0 / 64 : 0.0; });
    const auto up = filled(3 * 8 * 128, [](size_t i) { return i % 128 % 5 * (i / (8 * 128)); });
    std::vector<float> mix(3 * 48, 0.0F);
    for (size_t i = 0; i < mix.size(); ++i) mix[i] = i % 16 % 5 == 0 ? 1.0F : 0.0F;
    std::vector<__half> y(12 * 128, __float2half(-1.0F));
    const std::vector<int32_t> adapter{2, -1, 0, 1};
    std::vector<char> workspace(plugin.build->getWorkspaceSize(dynamic_with_slots(4, 3).data(), 6, nullptr, 1) + 256);
    void* aligned = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256);
    const void* inputs[] = {x.data(), base.data(), down.data(), mix.data(), up.data(), adapter.data()};
    void* outputs[] = {y.data()};
    bool right = plugin.runtime->enqueue(descs.data(), &descs[6], inputs, outputs, aligned, nullptr) == 0;
    for (size_t i = 0; i < y.size(); ++i) {
        const auto slot = static_cast<float>(std::max(adapter[i / (3 * 128)], 0));
        right &= __half2float(y[i]) == 1.0F + 2.0F * slot * static_cast<float>(i % 128 % 5);
    }
    check(right, "each row takes the weights of its slot");
}

void a_stored_plugin_comes_back(IPluginCreatorV3One& creator, const Capabilities& plugin) {
    const PluginFieldCollection* stored = plugin.runtime->getFieldsToSerialize();
    // TensorRT keeps bytes of its own.
    std::vector<std::string> bytes;
    std::vector<PluginField> copies;
    bytes.reserve(stored->nbFields);
    for (int32_t i = 0; i < stored->nbFields; ++i) {
        const PluginField& field = stored->fields[i];
        bytes.emplace_back(static_cast<const char*>(field.data), field.length * sizeof(int32_t));
        copies.emplace_back(field.name, bytes.back().data(), field.type, field.length);
    }
    const PluginFieldCollection collection{stored->nbFields, copies.data()};
    const Plugin restored(creator.createPlugin("layer0.q", &collection, TensorRTPhase::kRUNTIME));
    check(restored != nullptr, "the runtime phase makes a plugin of the stored fields");
    if (restored == nullptr) return;
    const Plugin attached(Capabilities(*restored).runtime->attachToContext(nullptr));
    check(attached != nullptr && attached.get() != restored.get(), "a context gets a plugin of its own");
    const Capabilities again(*attached);
    auto descs = tensors(2, 7);
    check(again.runtime->onShapeChange(descs.data(), 5, &descs[5], 1) == 0, "the restored plugin takes the shapes");
    descs[4] = tensor({8, 96});
    check(again.runtime->onShapeChange(descs.data(), 5, &descs[5], 1) != 0 && the_log.tells("layer0.q"),
          "and refuses wrong ones by the node's name");
    const PluginFieldCollection* twice = again.runtime->getFieldsToSerialize();
    bool equal = twice->nbFields == stored->nbFields;
    for (int32_t i = 0; equal && i < stored->nbFields; ++i) {
        equal =
            twice->fields[i].length == stored->fields[i].length &&
            std::memcmp(twice->fields[i].data, stored->fields[i].data, stored->fields[i].length * sizeof(int32_t)) == 0;
    }
    check(equal, "a copy stores what the original stored");
}

int run(const char* path, bool runs) {
    const Library library(path);
    auto* set_finder = library.find<void(ILoggerFinder*)>("setLoggerFinder");
    auto* get_creators = library.find<IPluginCreatorInterface* const*(int32_t&)>("getCreators");
    check(set_finder != nullptr && get_creators != nullptr, "the library has TensorRT's entry points");
    if (set_finder == nullptr || get_creators == nullptr) return 1;
    set_finder(&the_finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    check(count == 1, "there is one creator");
    auto& creator = *static_cast<IPluginCreatorV3One*>(creators[0]);
    check(std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "it makes plugins of version 3");
    check(std::string(creator.getPluginName()) == teamlora::kOpName &&
              std::string(creator.getPluginVersion()) == teamlora::kOpVersionText &&
              std::string(creator.getPluginNamespace()).empty(),
          "the creator has the op's name and version, in the namespace that ONNX parsers look in");
    check(creator.getFieldNames()->nbFields == 3, "it names its three fields");

    creation_refuses_wrong_attributes(creator);
    Fields fields({4}, {0}, {64, 32, 32});
    const Plugin made(creator.createPlugin("layer0.q", &fields.collection, TensorRTPhase::kBUILD));
    check(made != nullptr, "the attributes of a node make a plugin");
    if (made == nullptr) return 1;
    const Plugin clone(made->clone());
    const Capabilities plugin(*clone);
    check(plugin.core && plugin.build && plugin.runtime, "it has all three capabilities");
    check(std::string(plugin.core->getPluginName()) == teamlora::kOpName, "the plugin has the op's name");
    types_and_shapes_follow_the_inputs(plugin);
    formats_are_linear_and_of_one_type(plugin);
    configuration_and_workspace(plugin);
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
    const InterfaceInfo info = plugin.build->getInterfaceInfo();
    check(info.major == 2 && static_cast<IPluginV3OneBuildV2*>(plugin.build)->getAliasedInput(0) == 1,
          "y may be base's memory");
#endif
    enqueue_refuses_what_it_was_not_built_for(plugin);
    enqueue_runs_or_says_why_not(plugin, runs);
    slots_are_taken_with_their_indices(plugin);
    if (runs) enqueue_runs_slots(plugin);
    a_stored_plugin_comes_back(creator, plugin);
    return failed == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string mode = count == 3 ? arguments[2] : "";
    if (mode != "runs" && mode != "fails") {
        std::printf("life_cycle LIBRARY runs|fails\n");
        return 2;
    }
    const int code = run(arguments[1], mode == "runs");
    std::printf("%d passed, %d failed\n", passed, failed);
    return code;
}
