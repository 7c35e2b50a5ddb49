// The op's name and attributes, as teamlora_export/graph/op.py defines them; a test compares the two.
#pragma once

namespace teamlora {

inline constexpr const char* kOpName = "MixedExpertProjection";
inline constexpr const char* kOpDomain = "teamlora";
// What a node without the optional input is. TensorRT's plugin has this version for both: a node's does not reach it.
inline constexpr int kOpVersion = 1;
inline constexpr const char* kOpVersionText = "1";
inline constexpr const char* kOpInputs[] = {"x", "base", "down", "mix", "up"};
// What a node with it is: an adapter for each row.
inline constexpr int kOpAdaptersVersion = 2;
inline constexpr const char* kOpAdaptersVersionText = "2";
inline constexpr const char* kOpOptionalInputs[] = {"adapter"};
inline constexpr const char* kOpAttributes[] = {"num_experts", "shared_down", "out_splits"};

}  // namespace teamlora
