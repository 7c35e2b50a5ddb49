// The very same source as the GPU's, read by the host compiler.
#include "../kernels/launch.cu"
