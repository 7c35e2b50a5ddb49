#include "projection.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "code.h"

namespace teamlora::cpu {
namespace {

constexpr int64_t kCacheLine = 64;
// What a task of the few-tokens path reads at least: waking a thread takes as long as reading so much.
constexpr int64_t kTaskBytes = 256 << 10;
// So many tokens are multiplied while their weights are read from memory.
constexpr int64_t kFreeTokens = 8;
// More than so many full tiles of tokens make a task each.
constexpr int64_t kMostFewTiles = 8;
// Tokens of a block of the many-tokens path, at most: their z and v, and part of x, stay in the second cache.
constexpr int64_t kBlockTokens = 48;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Panels of `columns` columns from `first` on, behind those that are there.
void add_panels(std::vector<Panel>& panels, int64_t width, int64_t depth, int64_t first, int64_t columns,
                int64_t sibling) {
    for (int64_t done = 0; done < columns; done += width) {
        const int64_t offset = panels.empty() ? 0 : panels.back().offset + depth * panels.back().width;
        panels.push_back({offset, first + done, std::min(width, columns - done), sibling});
    }
}

int64_t elements(const std::vector<Panel>& panels, int64_t depth) {
    return panels.empty() ? 0 : panels.back().offset + depth * panels.back().width;
}

// Copies a matrix's elements into panels; (d, column) is at d * depth_step + column * column_step.
void pack(const std::vector<Panel>& panels, size_t element, const void* from, int64_t depth, int64_t depth_step,
          int64_t column_step, unsigned char* to) {
    for (const Panel& panel : panels) {
        for (int64_t d = 0; d < depth; ++d) {
            for (int64_t i = 0; i < panel.width; ++i, to += element) {
                const int64_t at = d * depth_step + (panel.column + i) * column_step;
                std::memcpy(to, static_cast<const unsigned char*>(from) + at * element, element);
            }
        }
    }
}

void run_tasks(const Parallel& parallel, int64_t count, void (*task)(void*, size_t), void* data) {
    if (count == 1) return task(data, 0);
    parallel.run(parallel.pool, task, static_cast<size_t>(count), data);
}

}  // namespace

void Workspace::Free::operator()(void* memory) const noexcept { std::free(memory); }

float* Workspace::floats(size_t count) {
    if (count > count_) {
        memory_.reset();
        count_ = 0;
        const auto bytes = static_cast<size_t>(round_up(static_cast<int64_t>(count * sizeof(float)), kCacheLine));
        memory_.reset(static_cast<float*>(std::aligned_alloc(kCacheLine, bytes)));
        if (memory_ == nullptr) throw std::bad_alloc();
        count_ = count;
    }
    return memory_.get();
}

Projection::Projection(Shape shape, const Code& code, const void* down, const float* mix, const void* up)
    : shape_(std::move(shape)), code_(code) {
    const auto element = static_cast<int64_t>(element_size(shape_.weights));
    const int64_t out = shape_.out();
    add_panels(down_panels_, code.panel_width, shape_.in, 0, shape_.rows(), 0);
    int64_t first = 0;
    for (int64_t g = 0; g < shape_.siblings(); first += shape_.out_splits[g++]) {
        add_panels(up_panels_, code.panel_width, shape_.up_rank(), first, shape_.out_splits[g], g);
    }
    // Panels are read up to a vector beyond their end.
    const int64_t room = code.panel_width * element;
    down_bytes_ = round_up(elements(down_panels_, shape_.in) * element + room, kCacheLine);
    weights_.resize(down_bytes_ + elements(up_panels_, shape_.up_rank()) * element + room);
    pack(down_panels_, element, down, shape_.in, 1, shape_.in, weights_.data());
    pack(up_panels_, element, up, shape_.up_rank(), out, 1, weights_.data() + down_bytes_);
    mix_.assign(mix, mix + shape_.siblings() * shape_.num_experts * shape_.num_experts);
}

// The depth of the first product is shared out, each task with a sum of its own; then the panels of the second.
struct Projection::Few {
    const Job& job;
    const Steps& steps;
    int64_t tokens, depth_tasks, panel_tasks;
    float *wide, *z, *v;

    int64_t z_count() const { return tokens * job.z_stride; }
    static void down(void* data, size_t index) {
        const Few& few = *static_cast<Few*>(data);
        const auto task = static_cast<int64_t>(index);
        const int64_t in = few.job.in;
        few.steps.down(few.job, 0, few.tokens, in * task / few.depth_tasks, in * (task + 1) / few.depth_tasks,
                       few.wide + task * few.tokens * kDepthBlock, few.z + task * few.z_count());
    }
    static void up(void* data, size_t index) {
        const Few& few = *static_cast<Few*>(data);
        const auto task = static_cast<int64_t>(index);
        const int64_t panels = few.job.num_up_panels;
        few.steps.up(few.job, 0, few.tokens, panels * task / few.panel_tasks, panels * (task + 1) / few.panel_tasks,
                     few.v);
    }
};

struct Projection::Many {
    const Job& job;
    const Steps& steps;
    int64_t tokens, block;
    int64_t wide_count, z_count, weights_count, v_count;
    float* memory;

    int64_t task_count() const { return wide_count + z_count + weights_count + v_count; }
    static void all(void* data, size_t index) {
        const Many& many = *static_cast<Many*>(data);
        const auto task = static_cast<int64_t>(index);
        const int64_t first = task * many.block, tokens = std::min(many.block, many.tokens - first);
        float* wide = many.memory + task * many.task_count();
        float* z = wide + many.wide_count;
        float* weights = z + many.z_count;
        float* v = weights + many.weights_count;
        many.steps.down(many.job, first, tokens, 0, many.job.in, wide, z);
        many.steps.route(many.job, tokens, z, weights, v);
        many.steps.up(many.job, first, tokens, 0, many.job.num_up_panels, v);
    }
};

void Projection::run(const Tensors& tensors, int64_t tokens, Workspace& workspace, const Parallel& parallel,
                     int64_t threads) const {
    if (tokens == 0 || shape_.out() == 0) return;
    const Steps* const all = shape_.weights == shape_.dtype ? code_.steps : code_.narrow;
    const Steps& steps = all[static_cast<int>(shape_.weights)];
    const Job job{shape_.in,
                  shape_.num_experts,
                  shape_.expert_rank,
                  shape_.down_rank(),
                  shape_.up_rank(),
                  shape_.siblings(),
                  shape_.out(),
                  shape_.shared_down,
                  round_up(shape_.rows(), code_.lanes),
                  round_up(shape_.siblings() * shape_.up_rank(), code_.lanes),
                  tensors.x,
                  tensors.base,
                  tensors.y,
                  weights_.data(),
                  weights_.data() + down_bytes_,
                  mix_.data(),
                  down_panels_.data(),
                  static_cast<int64_t>(down_panels_.size()),
                  up_panels_.data(),
                  static_cast<int64_t>(up_panels_.size())};
    const bool widens = shape_.dtype != DataType::kFloat32;
    const auto weights_count = [&](int64_t count) {
        return round_up((count + 1) * shape_.num_experts + code_.lanes, code_.lanes);
    };
    if (tokens < code_.tile_rows * std::min(threads, kMostFewTiles)) {
        const auto tasks = [&](int64_t bytes, int64_t most) {
            const int64_t work = bytes * std::max(tokens, kFreeTokens) / kFreeTokens;
            return std::clamp<int64_t>(work / kTaskBytes, 1, std::min(threads, most));
        };
        const int64_t depth_tasks = tasks(down_bytes_, shape_.in);
        const int64_t panel_tasks = tasks(static_cast<int64_t>(weights_.size()) - down_bytes_, job.num_up_panels);
        const int64_t wide_count = widens ? depth_tasks * tokens * kDepthBlock : 0;
        const int64_t z_count = tokens * job.z_stride;
        float* wide =
            workspace.floats(wide_count + depth_tasks * z_count + weights_count(tokens) + tokens * job.v_stride);
        float* z = wide + wide_count;
        float* weights = z + depth_tasks * z_count;
        Few few{job, steps, tokens, depth_tasks, panel_tasks, wide, z, weights + weights_count(tokens)};
        run_tasks(parallel, depth_tasks, Few::down, &few);
        for (int64_t task = 1; task < depth_tasks; ++task) {
            for (int64_t i = 0; i < z_count; ++i) z[i] += z[task * z_count + i];
        }
        steps.route(job, tokens, z, weights, few.v);
        run_tasks(parallel, panel_tasks, Few::up, &few);
        return;
    }
    const int64_t block =
        std::clamp(round_up((tokens + threads - 1) / threads, code_.tile_rows), code_.tile_rows, kBlockTokens);
    Many many{job,
              steps,
              tokens,
              block,
              widens ? block * kDepthBlock : 0,
              block * job.z_stride,
              weights_count(block),
              block * job.v_stride,
              nullptr};
    const int64_t tasks = (tokens + block - 1) / block;
    many.memory = workspace.floats(tasks * many.task_count());
    run_tasks(parallel, tasks, Many::all, &many);
}

}  // namespace teamlora::cpu
