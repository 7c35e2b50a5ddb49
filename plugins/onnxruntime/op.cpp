#include "op.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>

namespace teamlora {
namespace {

void require_shape(Input input, const Dims& found, const Dims& wanted) {
    if (found != wanted) {
        refuse(std::string(kOpInputs[input]) + " is " + text(found) + ", expected " + text(wanted) + ".");
    }
}

// A weight's shape without its slots.
Dims of_a_slot(Input input, const Dims& dims) {
    if (dims.empty()) refuse(std::string(kOpInputs[input]) + " is [], expected a dimension of slots first.");
    return {dims.begin() + 1, dims.end()};
}

}  // namespace

void refuse(const std::string& why) {
    throw Ort::Exception(std::string(kOpDomain) + "::" + kOpName + ": " + why, ORT_INVALID_ARGUMENT);
}

std::string text(const Dims& dims) {
    std::string result = "[";
    for (size_t i = 0; i < dims.size(); ++i) result += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
    return result + "]";
}

Attributes::Attributes(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info(raw);
    num_experts = info.GetAttribute<int64_t>("num_experts");
    shared_down = info.GetAttribute<int64_t>("shared_down") != 0;
    out_splits = info.GetAttributes<int64_t>("out_splits");
    const bool widths_fit =
        std::all_of(out_splits.begin(), out_splits.end(), [](int64_t n) { return n >= 0 && n <= INT32_MAX; });
    if (num_experts < 1 || out_splits.empty() || !widths_fit) {
        refuse("num_experts " + std::to_string(num_experts) + ", out_splits " + text(out_splits) + ".");
    }
}

Widths::Widths(const Attributes& attributes, const Dims& down, const Dims& mix, const Dims& up) {
    const auto siblings = static_cast<int64_t>(attributes.out_splits.size());
    const int64_t k = attributes.num_experts;
    if (down.size() != 2 || down[1] < 1) refuse("down is " + text(down) + ", expected two dimensions.");
    if (up.size() != 2 || up[0] < k || up[0] % k != 0) {
        refuse("up is " + text(up) + ", expected two dimensions, the first a multiple of num_experts " +
               std::to_string(k) + ".");
    }
    in = down[1];
    expert_rank = up[0] / k;
    out = std::accumulate(attributes.out_splits.begin(), attributes.out_splits.end(), int64_t{0});
    const int64_t down_rank = attributes.shared_down ? expert_rank : up[0];
    require_shape(kDown, down, {siblings * (down_rank + k), in});
    require_shape(kUp, up, {up[0], out});
    require_shape(kMix, mix, {siblings, k, k});
}

int64_t count_tokens(const Widths& widths, const Dims& x, const Dims& base) {
    if (x.empty() || x.back() != widths.in) {
        refuse("x is " + text(x) + ", expected a last dimension of " + std::to_string(widths.in) + ".");
    }
    Dims wanted = x;
    wanted.back() = widths.out;
    require_shape(kBase, base, wanted);
    return std::accumulate(x.begin(), x.end() - 1, int64_t{1}, std::multiplies<int64_t>());
}

int64_t count_row_tokens(const Widths& widths, const Dims& x, const Dims& base, const Dims& adapter) {
    if (x.size() != 3) {
        refuse("x is " + text(x) + ", expected [batch, tokens, in] beside an adapter for each row.");
    }
    count_tokens(widths, x, base);
    if (adapter.size() != 1 || (adapter[0] != 1 && adapter[0] != x[0])) {
        refuse("adapter is " + text(adapter) + ", expected [1] or [" + std::to_string(x[0]) + "].");
    }
    return x[1];
}

bool takes_adapters(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info(raw);
    return info.GetInputCount() > kAdapter && !info.GetInputName(kAdapter).empty();
}

SlotWidths::SlotWidths(const Attributes& attributes, const Dims& down, const Dims& mix, const Dims& up)
    : slots(down.empty() ? 0 : down[0]),
      widths(attributes, of_a_slot(kDown, down), of_a_slot(kMix, mix), of_a_slot(kUp, up)) {
    if (mix[0] != slots || up[0] != slots) {
        refuse("down, mix and up have " + std::to_string(slots) + ", " + std::to_string(mix[0]) + " and " +
               std::to_string(up[0]) + " slots.");
    }
}

void let_output_be_base(OrtCustomOp& op) {
    // By the C interface, since the C++ one throws at dimensions without a name.
    op.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        const Ort::Status unknown(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, kBase, &info));
        return unknown.IsOK() ? Ort::GetApi().ShapeInferContext_SetOutputTypeShape(context, 0, info) : nullptr;
    };
    op.GetMayInplace = [](int** input, int** output) -> size_t {
        *input = new int[1]{kBase};
        *output = new int[1]{0};
        return 1;
    };
    op.ReleaseMayInplace = [](int* input, int* output) {
        delete[] input;
        delete[] output;
    };
}

}  // namespace teamlora
