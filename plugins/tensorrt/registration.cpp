// TensorRT finds a plugin in two ways: an application asks its registry to load a library (`getCreators`), or it only
// opens the library, which registers what it holds (Triton's back end, ONNX Runtime's provider). Both are served: on
// load, the creator is put into the registry of the TensorRT that the process has; `getCreators` takes it out again and
// hands it over, since a registry takes no second of a name. (TensorRT-RTX 1.7.1 lets a library register while it loads
// it; a registry that is asked to load one twice refuses.)
//
// The library is not linked with TensorRT, so that it can also be opened, and described, where there is none.
#include "registration.h"

#include <dlfcn.h>

#include <atomic>
#include <string>

#include "creator.h"
#include "logging.h"

namespace teamlora {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginRegistry;

// TensorRT-RTX 1.7 has the registry of TensorRT 11, which left out what 10 had deprecated. (Not in the namespace
// without a name: a compiler could tell there that nothing implements it.)
#if NV_TENSORRT_MAJOR >= 11
using RtxRegistry = IPluginRegistry;
#else
class RtxRegistry {
public:
    virtual ~RtxRegistry() = 0;
    virtual void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept = 0;
    virtual nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(const char*) noexcept = 0;
    virtual void deregisterLibrary(void*) noexcept = 0;
    virtual bool registerCreator(IPluginCreatorInterface&, const char*) noexcept = 0;
    virtual IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept = 0;
    virtual IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept = 0;
    virtual bool deregisterCreator(const IPluginCreatorInterface&) noexcept = 0;
};
#endif

namespace {

constexpr int kRtxMajor = 1;

// The TensorRT library of the process, kept open while this is.
class Host {
public:
    Host() noexcept {
        // Found by its name among what is loaded, in whichever scope; then among the program's own symbols.
        for (const std::string& name : {"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR),
                                        "libtensorrt_rtx.so." + std::to_string(kRtxMajor), other_major()}) {
            if (library_ == nullptr && !name.empty()) library_ = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        }
        const auto version = find<int32_t() noexcept>("getInferLibVersion");
        const auto major = find<int32_t() noexcept>("getInferLibMajorVersion");
        if (version != nullptr && major != nullptr) version_ = version(), major_ = major();
    }
    ~Host() {
        if (library_ != nullptr) dlclose(library_);
    }
    Host(const Host&) = delete;
    Host& operator=(const Host&) = delete;

    bool is_other() const noexcept { return major_ != 0 && major_ != NV_TENSORRT_MAJOR && major_ != kRtxMajor; }
    int version() const noexcept { return version_; }

    // Calls `action` with the registry, if there is one that is known. Returns what it returns.
    template <typename Action>
    bool with_registry(Action action) const noexcept {
        const auto registry = find<void*() noexcept>("getPluginRegistry");
        void* found = registry != nullptr ? registry() : nullptr;
        if (found == nullptr) return false;
        if (major_ == NV_TENSORRT_MAJOR) return action(*static_cast<IPluginRegistry*>(found));
        return major_ == kRtxMajor && version_ >= 10700 && action(*static_cast<RtxRegistry*>(found));
    }

private:
    static std::string other_major() {
        for (int major = 8; major < 32; ++major) {
            std::string name = "libnvinfer.so." + std::to_string(major);
            void* const library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
            if (library == nullptr) continue;
            dlclose(library);
            return name;
        }
        return "";
    }

    template <typename Function>
    Function* find(const char* name) const noexcept {
        return reinterpret_cast<Function*>(dlsym(library_ != nullptr ? library_ : RTLD_DEFAULT, name));
    }

    void* library_ = nullptr;
    int version_ = 0, major_ = 0;
};

class Registration {
public:
    Registration() noexcept {
        if (host_.is_other()) {
            // No logger is known yet: it goes to standard error.
            log_error("", "was built with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                              ", and this process has version " + std::to_string(host_.version()) +
                              ". Build it again: teamlora-export plugins build");
            return;
        }
        registered_ = host_.with_registry([](auto& registry) { return registry.registerCreator(creator(), ""); });
    }
    // Nobody is left with a creator whose code has gone.
    ~Registration() { withdraw(); }
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;

    bool fits() const noexcept { return !host_.is_other(); }
    void withdraw() noexcept {
        if (!registered_.exchange(false)) return;
        host_.with_registry([](auto& registry) { return registry.deregisterCreator(creator()); });
    }

private:
    Host host_;
    std::atomic<bool> registered_{false};
};

Registration registration;

}  // namespace

IPluginCreatorInterface& creator() noexcept {
    static MixedExpertCreator made;
    return made;
}

bool hand_over_creator() noexcept {
    registration.withdraw();
    return registration.fits();
}

}  // namespace teamlora
