// The KV cache of a request on the GPU. There are three ways to keep it, and the engine and its model decide which:
//
//   in place  Input and output are one buffer of the engine's capacity, into which it writes. Shapes and addresses stay
//             the same, so that a step of decoding is one CUDA graph, recorded once for a batch.
//   fixed     For engines whose cache grows. It has a fixed length, most of it masked out; a step's new row is copied
//             into its slot. A step is a CUDA graph here too.
//   growing   What a step gives out goes in at the next one, in two sets of buffers that change places. For models with
//             sliding windows, which count the rows between two tokens, so that none may be skipped.
//
// In the first two, rows are read though they are masked out. What is masked out is multiplied by zero, which is no
// zero if it is NaN: so they are cleared for each request.
#pragma once

#include <cstddef>
#include <memory>

#include "backend.h"
#include "tensorrt_lane.h"

namespace teamlora {

// Takes a lane for a request of `batch` prompts, at most `most` tokens each, answer included. `rows`: the slot of each,
// where the engine takes adapters. `windowed`: some layer of the model has a sliding window. Throws an Error where the
// engine was built for fewer tokens.
std::unique_ptr<Decoder> open_cache(const Engine& engine, Lanes& lanes, std::size_t batch, std::size_t most,
                                    const Slots& rows, bool windowed);

}  // namespace teamlora
