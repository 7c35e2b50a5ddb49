// The emulated kernels for tests in other languages (ctypes).
#include <cstdio>

#include "emulation.h"
#include "mixed_expert.h"

extern "C" {

size_t teamlora_workspace_bytes(const teamlora::MixedExpertShape* shape) { return teamlora::workspace_bytes(*shape); }

// 0, or -1 with a line on standard error.
int teamlora_launch(const teamlora::MixedExpertShape* shape, const teamlora::MixedExpertTensors* tensors,
                    void* workspace, uint64_t schedule) {
    emulation::set_schedule(schedule);
    try {
        return teamlora::launch(*shape, *tensors, workspace, nullptr) == cudaSuccess ? 0 : -1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return -1;
    }
}
}
