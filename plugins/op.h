// The op's name and attributes, as teamlora_export/graph/op.py defines them; a test compares the two.
#pragma once

namespace teamlora {

inline constexpr const char* kOpName = "MixedExpertProjection";
inline constexpr const char* kOpDomain = "teamlora";
inline constexpr int kOpVersion = 1;
inline constexpr const char* kOpVersionText = "1";
inline constexpr const char* kOpInputs[] = {"x", "base", "down", "mix", "up"};
inline constexpr const char* kOpAttributes[] = {"num_experts", "shared_down", "out_splits"};

}  // namespace teamlora
