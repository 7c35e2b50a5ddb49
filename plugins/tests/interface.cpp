// The kernels for tests and measurements in other languages (ctypes): emulated, or on a GPU.
#include <cstdio>
#include <exception>

#include "mixed_expert.h"

#ifdef TEAMLORA_EMULATION
#include "emulation.h"
#endif

extern "C" {

// All but the first three return a cudaError_t, or -1 with a line on standard error.
size_t teamlora_workspace_bytes(const teamlora::MixedExpertShape* shape, const teamlora::Tuning* tuning) {
    return teamlora::workspace_bytes(*shape, *tuning);
}

size_t teamlora_workspace_bound(const teamlora::MixedExpertShape* shape, const teamlora::Tuning* tuning) {
    return teamlora::workspace_bound(*shape, *tuning);
}

// Why the kernels cannot take it, or NULL.
const char* teamlora_unsupported(const teamlora::MixedExpertShape* shape) { return teamlora::unsupported(*shape); }

int teamlora_tuning(teamlora::Tuning* tuning) { return teamlora::tuning_of_device(*tuning); }

int teamlora_launch(const teamlora::MixedExpertShape* shape, const teamlora::Tuning* tuning,
                    const teamlora::MixedExpertTensors* tensors, void* workspace, void* stream) {
    try {
        return teamlora::launch(*shape, *tuning, *tensors, workspace, static_cast<cudaStream_t>(stream));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return -1;
    }
}

#ifdef TEAMLORA_EMULATION
void teamlora_set_schedule(uint64_t schedule) { emulation::set_schedule(schedule); }

struct TeamloraLaunch {
    int32_t grid[3], threads;
    int64_t shared_bytes;
};

// What a call launches, which is not run: their number, of which `most` are written.
int teamlora_launches(const teamlora::MixedExpertShape* shape, const teamlora::Tuning* tuning, TeamloraLaunch* found,
                      int most) {
    const auto grids = emulation::record([&] { teamlora::launch(*shape, *tuning, {}, nullptr, nullptr); });
    for (size_t i = 0; i < grids.size() && i < static_cast<size_t>(most); ++i) {
        const emulation::Grid& grid = grids[i];
        found[i] = {
            {static_cast<int32_t>(grid.size.x), static_cast<int32_t>(grid.size.y), static_cast<int32_t>(grid.size.z)},
            static_cast<int32_t>(grid.block_size.x),
            static_cast<int64_t>(grid.shared_bytes)};
    }
    return static_cast<int>(grids.size());
}
#endif
}
