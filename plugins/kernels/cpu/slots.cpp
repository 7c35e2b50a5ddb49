#include "slots.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "code.h"

namespace teamlora::cpu {
namespace {

// What a task reads at least, so many tokens being free: as in projection.cpp.
constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kFreeTokens = 8;
// Tokens of one adapter that go through all steps together: their x, z and v stay in the second cache.
constexpr int64_t kMostTokens = 48;
// Columns.
constexpr int64_t kLine = 16;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Some tokens of one adapter: [from, to) of the call's list of tokens, which holds an adapter's behind one another.
struct Piece {
    int64_t slot, from, to;

    int64_t tokens() const { return to - from; }
};

// Where a piece's numbers are while it is computed.
struct Room {
    float *wide, *z, *weights, *v;
};

struct Call {
    const Shape& shape;
    const SlotTensors& tensors;
    const SlotSteps& steps;
    const Steps& dense;
    Job job;
    std::vector<Piece> pieces;
    // By token of the list.
    std::vector<const void*> x, base;
    std::vector<void*> y;
    // By slot, of those at work: see `Job::present`.
    std::vector<float> present;
    // A room for each task, or for each piece where several tasks share one.
    float* memory;
    int64_t wide_count, z_count, weights_count, v_count;
    int64_t tasks, parts;

    bool widens() const { return shape.dtype != DataType::kFloat32; }
    int64_t room_count() const { return wide_count + z_count + weights_count + v_count; }
    Room room(int64_t index) const {
        float* wide = memory + index * room_count();
        float* z = wide + wide_count;
        float* weights = z + z_count;
        return {wide, z, weights, weights + weights_count};
    }
    Job job_of(const Piece& piece) const {
        Job own = job;
        const auto element = static_cast<int64_t>(element_size(shape.weights));
        const int64_t experts = shape.siblings() * shape.num_experts;
        own.down = static_cast<const unsigned char*>(tensors.down) + piece.slot * shape.rows() * shape.in * element;
        own.up = static_cast<const unsigned char*>(tensors.up) + piece.slot * shape.up_rank() * shape.out() * element;
        own.mix = tensors.mix + piece.slot * experts * shape.num_experts;
        own.present = present.data() + piece.slot * experts;
        return own;
    }

    void widen(const Piece& piece, const Room& room) const {
        if (!widens()) return;
        for (int64_t t = 0; t < piece.tokens(); ++t) {
            steps.widen(x[piece.from + t], shape.in, room.wide + t * shape.in);
        }
    }
    void down(const Job& own, const Piece& piece, const Room& room, int64_t from, int64_t to) const {
        const float* values[kMostTokens];
        for (int64_t t = 0; t < piece.tokens(); ++t) {
            values[t] = widens() ? room.wide + t * shape.in : static_cast<const float*>(x[piece.from + t]);
        }
        steps.down(own, values, piece.tokens(), from, to, room.z);
    }
    void up(const Job& own, const Piece& piece, const Room& room, int64_t from, int64_t to) const {
        int64_t first = 0;
        for (int64_t g = 0; g < shape.siblings(); first += shape.out_splits[g++]) {
            const int64_t begin = std::max(from, first), end = std::min(to, first + shape.out_splits[g]);
            if (begin < end) {
                steps.up(own, base.data() + piece.from, y.data() + piece.from, piece.tokens(), g, begin, end, room.v);
            }
        }
    }

    static void whole(void* data, size_t index) {
        const Call& call = *static_cast<Call*>(data);
        const auto count = static_cast<int64_t>(call.pieces.size()), task = static_cast<int64_t>(index);
        const Room room = call.room(task);
        for (int64_t i = count * task / call.tasks; i < count * (task + 1) / call.tasks; ++i) {
            const Piece& piece = call.pieces[i];
            const Job own = call.job_of(piece);
            call.widen(piece, room);
            call.down(own, piece, room, 0, call.shape.rows());
            call.dense.route(own, piece.tokens(), room.z, room.weights, room.v);
            call.up(own, piece, room, 0, call.shape.out());
        }
    }
    // A part of a piece's rows of `down`, then of its columns of `up`, in whole cache lines.
    static void part_of_down(void* data, size_t index) {
        const Call& call = *static_cast<Call*>(data);
        const int64_t i = static_cast<int64_t>(index) / call.parts, part = static_cast<int64_t>(index) % call.parts;
        const int64_t rows = call.shape.rows();
        call.down(call.job_of(call.pieces[i]), call.pieces[i], call.room(i), rows * part / call.parts,
                  rows * (part + 1) / call.parts);
    }
    static void part_of_up(void* data, size_t index) {
        const Call& call = *static_cast<Call*>(data);
        const int64_t i = static_cast<int64_t>(index) / call.parts, part = static_cast<int64_t>(index) % call.parts;
        const int64_t lines = (call.shape.out() + kLine - 1) / kLine;
        const auto border = [&](int64_t at) { return std::min(lines * at / call.parts * kLine, call.shape.out()); };
        call.up(call.job_of(call.pieces[i]), call.pieces[i], call.room(i), border(part), border(part + 1));
    }
};

void run_tasks(const Parallel& parallel, int64_t count, void (*task)(void*, size_t), void* data) {
    if (count == 1) return task(data, 0);
    parallel.run(parallel.pool, task, static_cast<size_t>(count), data);
}

// Tokens adapter by adapter, cut into pieces; what has no adapter is copied.
void sort_tokens(Call& call, int64_t rows, int64_t tokens) {
    const Shape& shape = call.shape;
    const SlotTensors& tensors = call.tensors;
    const auto element = static_cast<int64_t>(element_size(shape.dtype));
    std::vector<int64_t> order(rows);
    for (int64_t row = 0; row < rows; ++row) order[row] = row;
    const auto slot_of = [&](int64_t row) -> int64_t { return tensors.adapter[tensors.one_for_all ? 0 : row]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slot_of(a) < slot_of(b); });
    int64_t last = -1;
    for (const int64_t row : order) {
        const int64_t slot = slot_of(row);
        const auto* base = static_cast<const unsigned char*>(tensors.base) + row * tokens * shape.out() * element;
        auto* y = static_cast<unsigned char*>(tensors.y) + row * tokens * shape.out() * element;
        if (slot < 0) {
            if (y != base) std::memcpy(y, base, static_cast<size_t>(tokens * shape.out() * element));
            continue;
        }
        const auto* x = static_cast<const unsigned char*>(tensors.x) + row * tokens * shape.in * element;
        for (int64_t t = 0; t < tokens; ++t) {
            const auto at = static_cast<int64_t>(call.base.size());
            if (slot != last || call.pieces.back().tokens() == kMostTokens) call.pieces.push_back({slot, at, at});
            last = slot;
            ++call.pieces.back().to;
            call.x.push_back(x + t * shape.in * element);
            call.base.push_back(base + t * shape.out() * element);
            call.y.push_back(y + t * shape.out() * element);
        }
    }
}

// Which experts of the slots at work there are.
void find_experts(Call& call) {
    const int64_t k = call.shape.num_experts, rows = call.shape.siblings() * k;
    int64_t most = 0;
    for (const Piece& piece : call.pieces) most = std::max(most, piece.slot);
    call.present.resize((most + 1) * rows);
    int64_t last = -1;
    for (const Piece& piece : call.pieces) {
        if (piece.slot == last) continue;
        last = piece.slot;
        const float* mix = call.tensors.mix + last * rows * k;
        for (int64_t row = 0; row < rows; ++row, mix += k) {
            call.present[last * rows + row] = std::any_of(mix, mix + k, [](float m) { return m != 0; }) ? 1.0F : 0.0F;
        }
    }
}

}  // namespace

void run_slots(const Shape& shape, const Code& code, const SlotTensors& tensors, int64_t rows, int64_t tokens,
               Workspace& workspace, const Parallel& parallel, int64_t threads) {
    if (rows == 0 || tokens == 0 || shape.out() == 0) return;
    const auto type = static_cast<int>(shape.weights);
    const bool own = shape.weights == shape.dtype;
    const SlotSteps& steps = (own ? code.slots : code.narrow_slots)[type];
    const auto weights_count = [&](int64_t count) {
        return round_up((count + 1) * shape.num_experts + code.lanes, code.lanes);
    };
    Job job{};
    job.in = shape.in;
    job.num_experts = shape.num_experts;
    job.expert_rank = shape.expert_rank;
    job.down_rank = shape.down_rank();
    job.up_rank = shape.up_rank();
    job.siblings = shape.siblings();
    job.out = shape.out();
    job.shared_down = shape.shared_down;
    job.z_stride = round_up(shape.rows(), code.lanes);
    job.v_stride = round_up(shape.siblings() * shape.up_rank(), code.lanes);
    const Steps& dense = (own ? code.steps : code.narrow)[type];
    Call call{shape, tensors, steps, dense, job, {}, {}, {}, {}, {}, nullptr, 0, 0, 0, 0, 1, 1};
    sort_tokens(call, rows, tokens);
    if (call.pieces.empty()) return;
    find_experts(call);

    const auto pieces = static_cast<int64_t>(call.pieces.size());
    const auto element = static_cast<int64_t>(element_size(shape.weights));
    const int64_t bytes = (shape.rows() * shape.in + shape.up_rank() * shape.out()) * element;
    int64_t work = 0, most = 0;
    for (const Piece& piece : call.pieces) {
        work += bytes * std::max(piece.tokens(), kFreeTokens) / kFreeTokens;
        most = std::max(most, piece.tokens());
    }
    const int64_t wanted = std::clamp<int64_t>(work / kTaskBytes, 1, threads);
    call.wide_count = call.widens() ? round_up(most * shape.in, code.lanes) : 0;
    call.z_count = most * job.z_stride;
    call.weights_count = weights_count(most);
    call.v_count = most * job.v_stride;
    call.memory = workspace.floats(static_cast<size_t>(std::min(wanted, pieces) * call.room_count()));
    if (wanted <= pieces) {
        call.tasks = wanted;
        return run_tasks(parallel, wanted, Call::whole, &call);
    }
    call.parts = (wanted + pieces - 1) / pieces;
    for (int64_t i = 0; i < pieces; ++i) call.widen(call.pieces[i], call.room(i));
    run_tasks(parallel, pieces * call.parts, Call::part_of_down, &call);
    for (int64_t i = 0; i < pieces; ++i) {
        const Room room = call.room(i);
        call.dense.route(call.job_of(call.pieces[i]), call.pieces[i].tokens(), room.z, room.weights, room.v);
    }
    run_tasks(parallel, pieces * call.parts, Call::part_of_up, &call);
}

}  // namespace teamlora::cpu
