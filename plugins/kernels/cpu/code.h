// What is compiled once for each instruction set (code.cpp), and how one of them is chosen.
#pragma once

#include "projection.h"

namespace teamlora::cpu {

// A call as the compiled code sees it: plain numbers and pointers.
struct Job {
    int64_t in, num_experts, expert_rank, down_rank, up_rank, siblings, out;
    bool shared_down;
    // Of a token's z, and of its v, in floats.
    int64_t z_stride, v_stride;
    const void* x;
    const void* base;
    void* y;
    const void* down;
    const void* up;
    const float* mix;
    const Panel* down_panels;
    int64_t num_down_panels;
    const Panel* up_panels;
    int64_t num_up_panels;
    // [G, k]: 1 for experts that take part in the routing, 0 for others, all of whose `mix` is zero; null where all do.
    const float* present = nullptr;
};

// One instruction set's code for one T and one type of weights. `tokens` tokens from `first` on.
struct Steps {
    // z = x downT over the columns [from, to) of x. `wide` holds tokens x kDepthBlock floats where T has 16 bits.
    void (*down)(const Job& job, int64_t first, int64_t tokens, int64_t from, int64_t to, float* wide, float* z);
    // v from the whole of z, which is rounded to T on the way. `weights` holds (tokens + 1) x k floats and a vector.
    void (*route)(const Job& job, int64_t tokens, float* z, float* weights, float* v);
    // y = base + v up in the panels [from, to).
    void (*up)(const Job& job, int64_t first, int64_t tokens, int64_t from, int64_t to, const float* v);
};

// The same on weights as they lie: `job.down` and `job.up` are one slot's, and there are no panels.
struct SlotSteps {
    void (*widen)(const void* x, int64_t count, float* to);
    // z of the rows [from, to) of `down`, from x by token.
    void (*down)(const Job& job, const float* const* x, int64_t tokens, int64_t from, int64_t to, float* z);
    // y = base + v up in the columns [from, to), which are the sibling's; base and y by token.
    void (*up)(const Job& job, const void* const* base, void* const* y, int64_t tokens, int64_t sibling, int64_t from,
               int64_t to, const float* v);
};

struct Code {
    const char* name;
    // Floats of a vector; of a full tile, the rows (tokens) and the columns (a panel's width).
    int64_t lanes, tile_rows, panel_width;
    Steps steps[3];                 // by DataType, of T and of the weights
    Steps narrow[3];                // by DataType of the weights, where T is float32
    const SlotSteps* slots;         // by DataType, of T and of the weights
    const SlotSteps* narrow_slots;  // by DataType of the weights, where T is float32
};

// Columns of x that are multiplied before the next are looked at: a panel's part stays in the first cache.
inline constexpr int64_t kDepthBlock = 256;

// Those that this processor runs, the fastest first; the last one is portable.
const std::vector<const Code*>& available_codes();

}  // namespace teamlora::cpu
