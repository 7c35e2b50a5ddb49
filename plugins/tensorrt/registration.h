// Registers the plugin when the library is loaded, in the TensorRT of the process.
#pragma once

#include <NvInferRuntime.h>

namespace teamlora {

// The plugin's creator. There is one for the process.
nvinfer1::IPluginCreatorInterface& creator() noexcept;

// Takes the creator out of the registry again, so that it can be given to whoever asks for it. False: not to this
// process's TensorRT, whose major version is not the headers': its interfaces lie elsewhere in memory.
bool hand_over_creator() noexcept;

}  // namespace teamlora
