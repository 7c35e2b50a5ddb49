// How kernels are launched (kernels/launching.h), with a CUDA runtime of this file's own that notes what it is asked
// for.
//
//     launching DRIVER_VERSION PTX_VERSION [PLACE...]
//
// Prints whether kernels overlap, then, for each kernel of a call of three, its attributes. A call is made in each
// PLACE: where the wish for shared memory is `refused`; `captured`; both, `refused-captured`, where a refusal ends the
// capture; `implicit`, where none can tell whether it is captured; where all is `broken`; or any other.
#include "launching.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <utility>

namespace {

int driver, ptx;
std::string place;
bool capture_is_over = false;
cudaError_t last_error = cudaSuccess;

bool is(const char* word) { return place.find(word) != std::string::npos; }

cudaError_t fail(cudaError_t error) {
    last_error = error;
    return error;
}

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

bool has_share(const cudaLaunchConfig_t& config) {
    return std::any_of(config.attrs, config.attrs + config.numAttrs, [](const cudaLaunchAttribute& attribute) {
        return attribute.id == cudaLaunchAttributePreferredSharedMemoryCarveout;
    });
}

}  // namespace

extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    const bool right = function == reinterpret_cast<const void*>(&kernel) && *static_cast<int*>(arguments[0]) == 3 &&
                       *static_cast<float*>(arguments[1]) == 0.5F && config->gridDim.y == 5 &&
                       config->blockDim.x == 64 && config->dynamicSmemBytes == 1000;
    std::printf(right ? "kernel" : "another kernel, or other arguments");
    print(*config);
    if (is("broken")) return fail(cudaErrorLaunchFailure);
    if (capture_is_over) return fail(cudaErrorStreamCaptureInvalidated);
    if (!is("refused") || !has_share(*config)) return cudaSuccess;
    capture_is_over = is("captured");
    return fail(cudaErrorNotSupported);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    if (is("implicit")) return last_error = cudaErrorStreamCaptureImplicit;
    *status = is("captured") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
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

void call(bool overlaps) {
    using teamlora::Place;
    for (const Place each : {Place::kFirst, Place::kNext, Place::kLast}) {
        const cudaError_t error =
            teamlora::launch_kernel(kernel, dim3(4, 5), dim3(64), 1000, nullptr, each, overlaps, 3, 0.5F);
        if (error != cudaSuccess) {
            std::printf("the call fails with error %d\n", error);
            last_error = cudaSuccess;
            return;
        }
    }
    if (last_error != cudaSuccess) std::printf("an error is left\n");
}

int main(int count, char** words) {
    if (count < 3) return 2;
    driver = std::atoi(words[1]);
    ptx = std::atoi(words[2]);
    teamlora::Device device{};
    const cudaError_t error = teamlora::ask_device(0, kernel, device);
    if (error != cudaSuccess) {
        std::printf("error %d\n", error);
        return 0;
    }
    std::printf("%d multiprocessors, overlaps=%d\n", device.multiprocessors, device.overlaps);
    if (count == 3) call(device.overlaps);
    for (int i = 3; i < count; ++i) {
        place = words[i];
        call(device.overlaps);
    }
    return 0;
}
