// Errors reach TensorRT's logger, with the node's name; nothing is thrown across its interfaces.
#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace teamlora {

// The finder that the application gave with `setLoggerFinder`; errors go to standard error without one.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

void log_error(const std::string& node, const std::string& message) noexcept;

}  // namespace teamlora
