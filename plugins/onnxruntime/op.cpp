#include "op.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <string>
#include <thread>
#include <utility>

#include "../kernels/cpu/code.h"

namespace teamlora {
namespace {

// Workspaces of all nodes of all sessions: as many as calls have run at once.
class Workspaces {
public:
    std::unique_ptr<cpu::Workspace> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) return std::make_unique<cpu::Workspace>();
        std::unique_ptr<cpu::Workspace> taken = std::move(free_.back());
        free_.pop_back();
        return taken;
    }
    void give(std::unique_ptr<cpu::Workspace> workspace) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(workspace));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<cpu::Workspace>> free_;
};

Workspaces& workspaces() {
    static Workspaces all;
    return all;
}

// One of them, for as long as a call lasts.
class Lease {
public:
    Lease() : workspace_(workspaces().take()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { workspaces().give(std::move(workspace_)); }
    cpu::Workspace& operator*() const { return *workspace_; }

private:
    std::unique_ptr<cpu::Workspace> workspace_;
};

std::string text(const std::vector<int64_t>& shape) {
    std::string result = "[";
    for (size_t i = 0; i < shape.size(); ++i) result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return result + "]";
}

[[noreturn]] void refuse(const std::string& why) {
    throw Ort::Exception(std::string(kOpDomain) + "::" + kOpName + ": " + why, ORT_INVALID_ARGUMENT);
}

void require_shape(Input input, const std::vector<int64_t>& found, const std::vector<int64_t>& wanted) {
    if (found != wanted) {
        refuse(std::string(kOpInputs[input]) + " is " + text(found) + ", expected " + text(wanted) + ".");
    }
}

// What `work` throws, as ONNX Runtime takes it and releases it.
template <class Work>
OrtStatusPtr as_status(const Work& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (const Ort::Exception& error) {
        return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
        return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
    }
}

// Tasks on the threads of the session that calls.
void run_in_session(void* context, void (*task)(void*, size_t), size_t count, void* data) {
    Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(task, count, 0, data);
}

int64_t num_threads() {
    static const int64_t count = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
    return count;
}

}  // namespace

MixedExpertKernel::MixedExpertKernel(const OrtKernelInfo* raw, cpu::DataType dtype) : dtype_(dtype) {
    const Ort::ConstKernelInfo info(raw);
    num_experts_ = info.GetAttribute<int64_t>("num_experts");
    shared_down_ = info.GetAttribute<int64_t>("shared_down") != 0;
    out_splits_ = info.GetAttributes<int64_t>("out_splits");
    const bool widths_fit = std::all_of(out_splits_.begin(), out_splits_.end(), [](int64_t n) { return n >= 0; });
    if (num_experts_ < 1 || out_splits_.empty() || !widths_fit) {
        refuse("num_experts " + std::to_string(num_experts_) + ", out_splits " + text(out_splits_) + ".");
    }
    Ort::ConstValue weights[kNumInputs];
    bool constant = true;
    for (const Input input : {kDown, kMix, kUp}) {
        int is_constant = 0;
        weights[input] = info.GetTensorConstantInput(input, &is_constant);
        constant = constant && is_constant != 0;
    }
    if (constant) packed_.emplace(pack([&](Input input) { return weights[input]; }));
}

template <class Get>
cpu::Projection MixedExpertKernel::pack(const Get& input) const {
    const auto shape_of = [&](Input which) { return input(which).GetTensorTypeAndShapeInfo().GetShape(); };
    const auto down = shape_of(kDown), up = shape_of(kUp);
    const auto siblings = static_cast<int64_t>(out_splits_.size());
    const int64_t k = num_experts_;
    if (down.size() != 2 || down[1] < 1) refuse("down is " + text(down) + ", expected two dimensions.");
    if (up.size() != 2 || up[0] < k || up[0] % k != 0) {
        refuse("up is " + text(up) + ", expected two dimensions, the first a multiple of num_experts " +
               std::to_string(k) + ".");
    }
    cpu::Shape shape{dtype_, down[1], k, up[0] / k, shared_down_, out_splits_};
    require_shape(kDown, down, {shape.rows(), shape.in});
    require_shape(kUp, up, {shape.up_rank(), shape.out()});
    require_shape(kMix, shape_of(kMix), {siblings, k, k});
    return cpu::Projection(std::move(shape), *cpu::available_codes().front(), input(kDown).GetTensorRawData(),
                           input(kMix).template GetTensorData<float>(), input(kUp).GetTensorRawData());
}

OrtStatusPtr MixedExpertKernel::ComputeV2(OrtKernelContext* context) noexcept {
    return as_status([&] { compute(context); });
}

void MixedExpertKernel::compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    std::optional<cpu::Projection> made;
    if (!packed_) made.emplace(pack([&](Input input) { return context.GetInput(input); }));
    const cpu::Projection& projection = packed_ ? *packed_ : *made;

    const Ort::ConstValue x = context.GetInput(kX), base = context.GetInput(kBase);
    std::vector<int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.empty() || shape.back() != projection.shape().in) {
        refuse("x is " + text(shape) + ", expected a last dimension of " + std::to_string(projection.shape().in) + ".");
    }
    const int64_t tokens = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<int64_t>());
    shape.back() = projection.shape().out();
    require_shape(kBase, base.GetTensorTypeAndShapeInfo().GetShape(), shape);
    Ort::UnownedValue y = context.GetOutput(0, shape);
    const Lease workspace;
    projection.run({x.GetTensorRawData(), base.GetTensorRawData(), y.GetTensorMutableRawData()}, tokens, *workspace,
                   {run_in_session, raw}, num_threads());
}

MixedExpertOp::MixedExpertOp(cpu::DataType dtype) : dtype_(dtype) {
    // y is like `base`; where that is known, ONNX Runtime may let it have the same memory. By the C interface, since
    // the C++ one throws at dimensions without a name.
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        const Ort::Status unknown(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, kBase, &info));
        return unknown.IsOK() ? Ort::GetApi().ShapeInferContext_SetOutputTypeShape(context, 0, info) : nullptr;
    };
    OrtCustomOp::GetMayInplace = [](int** input, int** output) -> size_t {
        *input = new int[1]{kBase};
        *output = new int[1]{0};
        return 1;
    };
    OrtCustomOp::ReleaseMayInplace = [](int* input, int* output) {
        delete[] input;
        delete[] output;
    };
}

OrtStatusPtr MixedExpertOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return as_status([&] { *kernel = new MixedExpertKernel(info, dtype_); });
}

ONNXTensorElementDataType MixedExpertOp::GetInputType(size_t index) const {
    if (index == kMix || dtype_ == cpu::DataType::kFloat32) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return dtype_ == cpu::DataType::kFloat16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                             : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

}  // namespace teamlora
