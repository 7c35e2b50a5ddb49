#include "cpu_kernel.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "../kernels/cpu/code.h"
#include "../kernels/cpu/slots.h"

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

// Tasks on the threads of the session that calls.
void run_in_session(void* context, void (*task)(void*, size_t), size_t count, void* data) {
    Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(task, count, 0, data);
}

int64_t num_threads() {
    static const int64_t count = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
    return count;
}

}  // namespace

CpuKernel::CpuKernel(const OrtKernelInfo* raw, ONNXTensorElementDataType type)
    : dtype_(data_type_of<cpu::DataType>(type)), attributes_(raw), takes_adapters_(takes_adapters(raw)) {
    const Ort::ConstKernelInfo info(raw);
    weights_ = data_type_of<cpu::DataType>(info.GetInputTypeInfo(kDown).GetTensorTypeAndShapeInfo().GetElementType());
    if (takes_adapters_) return;
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
CpuKernel::Packed CpuKernel::pack(const Get& input) const {
    const Widths widths(attributes_, dims_of(input(kDown)), dims_of(input(kMix)), dims_of(input(kUp)));
    return {widths, cpu::Projection(shape_of(widths), *cpu::available_codes().front(), input(kDown).GetTensorRawData(),
                                    input(kMix).template GetTensorData<float>(), input(kUp).GetTensorRawData())};
}

cpu::Shape CpuKernel::shape_of(const Widths& widths) const {
    return {dtype_,
            widths.in,
            attributes_.num_experts,
            widths.expert_rank,
            attributes_.shared_down,
            attributes_.out_splits,
            weights_};
}

OrtStatusPtr CpuKernel::ComputeV2(OrtKernelContext* context) noexcept {
    return as_status([&] { takes_adapters_ ? compute_slots(context) : compute(context); });
}

void CpuKernel::compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    std::optional<Packed> made;
    if (!packed_) made.emplace(pack([&](Input input) { return context.GetInput(input); }));
    const Packed& packed = packed_ ? *packed_ : *made;

    const Ort::ConstValue x = context.GetInput(kX), base = context.GetInput(kBase);
    const Dims shape = dims_of(base);
    const int64_t tokens = count_tokens(packed.widths, dims_of(x), shape);
    Ort::UnownedValue y = context.GetOutput(0, shape);
    const Lease workspace;
    packed.projection.run({x.GetTensorRawData(), base.GetTensorRawData(), y.GetTensorMutableRawData()}, tokens,
                          *workspace, {run_in_session, raw}, num_threads());
}

void CpuKernel::compute_slots(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const Ort::ConstValue x = context.GetInput(kX), base = context.GetInput(kBase), down = context.GetInput(kDown),
                          mix = context.GetInput(kMix), up = context.GetInput(kUp),
                          adapter = context.GetInput(kAdapter);
    const SlotWidths sizes(attributes_, dims_of(down), dims_of(mix), dims_of(up));
    const Dims given = dims_of(x), shape = dims_of(base), indices = dims_of(adapter);
    if (given.size() != 3)
        refuse("x is " + text(given) + ", expected [batch, tokens, in] beside an adapter for each row.");
    count_tokens(sizes.widths, given, shape);
    if (indices.size() != 1 || (indices[0] != 1 && indices[0] != given[0])) {
        refuse("adapter is " + text(indices) + ", expected [1] or [" + std::to_string(given[0]) + "].");
    }
    const int32_t* numbers = adapter.GetTensorData<int32_t>();
    for (int64_t row = 0; row < indices[0]; ++row) {
        if (numbers[row] >= sizes.slots) {
            refuse("adapter holds " + std::to_string(numbers[row]) + ", there are " + std::to_string(sizes.slots) +
                   " slots.");
        }
    }
    Ort::UnownedValue y = context.GetOutput(0, shape);
    const Lease workspace;
    const cpu::SlotTensors tensors{x.GetTensorRawData(),
                                   base.GetTensorRawData(),
                                   y.GetTensorMutableRawData(),
                                   down.GetTensorRawData(),
                                   mix.GetTensorData<float>(),
                                   up.GetTensorRawData(),
                                   numbers,
                                   indices[0] == 1};
    cpu::run_slots(shape_of(sizes.widths), *cpu::available_codes().front(), tensors, given[0], given[1], *workspace,
                   {run_in_session, raw}, num_threads());
}

}  // namespace teamlora
