// The projection of version 2 of the op: an adapter for each row of a batch, whose weights lie in one of N slots.
//
// Slots are read as they are: whoever exchanges an adapter writes into its slot, and the next call computes with what
// is there. Rows of one adapter are taken together, so that each weight is read once for all of them. What a row gives
// does not depend on the others, to the bit.
//
// Experts whose row of `mix` is all zeros have no part in the routing, and siblings without any other add nothing: so
// adapters of different sizes share a slot's shape.
#pragma once

#include "projection.h"

namespace teamlora::cpu {

// T, x and base and y [rows, tokens, ..]. `y` may be `base` itself; nothing else may overlap.
struct SlotTensors {
    const void* x;
    const void* base;
    void* y;
    const void* down;        // of `Shape::weights`, [N, G (a + k), in]
    const float* mix;        // [N, G, k, k]
    const void* up;          // of `Shape::weights`, [N, k c, O]
    const int32_t* adapter;  // [rows], or [1] for all rows; below N, and below 0 where y = base
    bool one_for_all;
};

// `threads`: into how many tasks the call is cut at most, where it is worth it.
void run_slots(const Shape& shape, const Code& code, const SlotTensors& tensors, int64_t rows, int64_t tokens,
               Workspace& workspace, const Parallel& parallel, int64_t threads);

}  // namespace teamlora::cpu
