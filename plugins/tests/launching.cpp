// How kernels are launched (kernels/launching.h), with a CUDA runtime of this file's own that notes what it is asked
// for.
//
//     launching DRIVER_VERSION PTX_VERSION
//
// Prints whether kernels overlap, then, for each kernel of a call of three, its attributes.
#include "launching.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace {

int driver, ptx;

void kernel(int, float) {}

void print(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config.attrs[i];
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            std::printf(" overlap=%d", attribute.val.programmaticStreamSerializationAllowed);
        } else if (attribute.id == cudaLaunchAttributePreferredSharedMemoryCarveout) {
            std::printf(" share=%u", attribute.val.sharedMemCarveout);
        } else {
            std::printf(" unknown");
        }
    }
    std::printf("\n");
}

}  // namespace

extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    const bool right = function == reinterpret_cast<const void*>(&kernel) && *static_cast<int*>(arguments[0]) == 3 &&
                       *static_cast<float*>(arguments[1]) == 0.5F && config->gridDim.y == 5 &&
                       config->blockDim.x == 64 && config->dynamicSmemBytes == 1000;
    std::printf(right ? "kernel" : "another kernel, or other arguments");
    print(*config);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver;
    return driver > 0 ? cudaSuccess : cudaErrorInitializationError;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = ptx;
    return ptx > 0 ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : -1;
    return cudaSuccess;
}
}

int main(int count, char** words) {
    if (count != 3) return 2;
    driver = std::atoi(words[1]);
    ptx = std::atoi(words[2]);
    teamlora::Device device{};
    const cudaError_t error = teamlora::ask_device(0, kernel, device);
    if (error != cudaSuccess) {
        std::printf("error %d\n", error);
        return 0;
    }
    std::printf("%d multiprocessors, overlaps=%d\n", device.multiprocessors, device.overlaps);
    using teamlora::Place;
    for (const Place place : {Place::kFirst, Place::kNext, Place::kLast}) {
        teamlora::launch_kernel(kernel, dim3(4, 5), dim3(64), 1000, nullptr, place, device.overlaps, 3, 0.5F);
    }
    return 0;
}
