// The opened engine of the TensorRT back end, and its execution contexts. TensorRT's own interface ends here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"
#include "folder.h"

namespace teamlora {

enum class Element { kInt64, kInt32, kFloat32, kFloat16, kBfloat16 };
// -1 stands for a dynamic size.
using Shape = std::vector<std::int64_t>;

struct Tensor {
    std::string name;
    Element type;
    Shape shape;
    bool is_input;
};

// What an engine needs for one call at a time; for one thread.
class Context {
public:
    virtual ~Context() = default;
    // Throws an Error where the context's profile does not take the shape.
    virtual void set_shape(const Tensor& input, const Shape& shape) = 0;
    // Of an output, once the inputs have their shapes.
    virtual Shape shape_of(const Tensor& output) const = 0;
    // Device memory that an input is read from or an output is written to.
    virtual void bind(const Tensor& tensor, void* address) = 0;
    // False: TensorRT refused, and last_error() says why.
    virtual bool enqueue(const Stream& stream) = 0;
};

// May be used by many threads at once.
class Engine {
public:
    virtual ~Engine() = default;
    virtual const std::vector<Tensor>& tensors() const = 0;
    // A context for the last profile (decoding, where there are two) or the first.
    virtual std::unique_ptr<Context> context(bool last, const Stream& stream) const = 0;
    // The largest shape that a profile takes.
    virtual Shape at_most(const Tensor& input, bool last) const = 0;
    virtual std::string last_error() const = 0;
};

// Of one number.
inline std::size_t size_of(Element type) {
    switch (type) {
        case Element::kInt64:
            return 8;
        case Element::kInt32:
        case Element::kFloat32:
            return 4;
        default:
            return 2;
    }
}

// Loads the folder's plugin, where it has one, and the engine `name`. Throws an Error with TensorRT's reason.
std::unique_ptr<Engine> open_engine(const Folder& folder, const std::string& name);

}  // namespace teamlora
