// A GPU that is the host, as tests/runtime/host_gpu.py: CUDA's calls on the host's memory, and TensorRT's on ONNX Runtime,
// so that what the library does over those calls is run. Engines are ONNX files. Work waits until its stream is waited for;
// memory is handed out full of NaN; what is not given back, and what is copied up, is counted.
#include <NvInferRuntime.h>

#include <onnxruntime_cxx_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace {

std::atomic<long> alive{0}, contexts{0}, uploaded_bytes{0}, memory_left{1L << 30};

struct Counted {
    Counted() { ++alive; }
    Counted(const Counted &) = delete;
    ~Counted() { --alive; }
};

std::mutex blocks_mutex;
std::map<void *, std::size_t> blocks;

Ort::Env &environment() {
    static Ort::Env only(ORT_LOGGING_LEVEL_FATAL, "host_gpu");
    return only;
}

}  // namespace

struct HostStream : Counted {
    std::vector<std::function<void()>> work;
};

extern "C" {

long host_gpu_alive() { return alive; }
long host_gpu_contexts() { return contexts.exchange(0); }             // that were made since the last call
long host_gpu_uploaded_bytes() { return uploaded_bytes.exchange(0); }  // likewise
void host_gpu_set_memory(long bytes) { memory_left = bytes; }

const char *cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char *cudaGetErrorString(cudaError_t) { return "invalid argument"; }

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *facts, int) {
    *facts = {"the host", 8, 9};
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **address, std::size_t bytes) {
    const long size = static_cast<long>(bytes);
    if (memory_left.fetch_sub(size) < size) {
        memory_left += size;
        return cudaErrorMemoryAllocation;
    }
    *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*address, 0xFF, bytes);
    ++alive;
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks.emplace(*address, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    memory_left += static_cast<long>(blocks.at(address));
    blocks.erase(address);
    std::free(address);
    --alive;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind == cudaMemcpyHostToDevice) {
        uploaded_bytes += static_cast<long>(bytes);
        const std::string staged(static_cast<const char *>(from), bytes);
        stream->work.push_back([=] { std::memcpy(to, staged.data(), staged.size()); });
    } else {
        stream->work.push_back([=] { std::memcpy(to, from, bytes); });
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new HostStream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    try {
        for (const auto &work : stream->work) work();
    } catch (const std::exception &) {
        return cudaErrorInvalidValue;
    }
    stream->work.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

std::int32_t getInferLibMajorVersion() noexcept { return 1; }
std::int32_t getInferLibMinorVersion() noexcept { return 0; }
std::int32_t getInferLibPatchVersion() noexcept { return 0; }
std::int32_t getInferLibBuildVersion() noexcept { return 0; }
}

namespace nvinfer1 {

namespace {

struct Io {
    std::string name;
    TensorIOMode mode;
    ONNXTensorElementDataType type;
    Dims dims;
};

std::size_t bytes_of(const Io &io, const Dims &dims) {
    std::size_t bytes = io.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64   ? 8
                        : io.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4
                                                                         : 1;
    for (std::int32_t k = 0; k < dims.nbDims; ++k) bytes *= static_cast<std::size_t>(dims.d[k]);
    return bytes;
}

struct HostConfig : IRuntimeConfig, Counted {
    bool eager = false;
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept override {
        eager = strategy == DynamicShapesKernelSpecializationStrategy::kEAGER;
    }
};

struct HostEngine : ICudaEngine, Counted {
    Ort::Session session;
    std::vector<Io> io;

    HostEngine(const void *plan, std::size_t bytes) : session(environment(), plan, bytes, Ort::SessionOptions()) {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto add = [&](std::string name, TensorIOMode mode, const Ort::TypeInfo &info) {
            const auto tensor = info.GetTensorTypeAndShapeInfo();
            Dims dims{0, {}};
            for (const std::int64_t size : tensor.GetShape()) dims.d[dims.nbDims++] = size;
            io.push_back({std::move(name), mode, tensor.GetElementType(), dims});
        };
        for (std::size_t k = 0; k < session.GetInputCount(); ++k)
            add(session.GetInputNameAllocated(k, allocator).get(), TensorIOMode::kINPUT, session.GetInputTypeInfo(k));
        for (std::size_t k = 0; k < session.GetOutputCount(); ++k)
            add(session.GetOutputNameAllocated(k, allocator).get(), TensorIOMode::kOUTPUT, session.GetOutputTypeInfo(k));
    }

    const Io &of(std::string_view name) const {
        for (const Io &one : io)
            if (one.name == name) return one;
        std::abort();
    }
    std::int32_t getNbIOTensors() const noexcept override { return static_cast<std::int32_t>(io.size()); }
    const char *getIOTensorName(std::int32_t index) const noexcept override { return io[index].name.c_str(); }
    TensorIOMode getTensorIOMode(const char *name) const noexcept override { return of(name).mode; }
    TensorLocation getTensorLocation(const char *) const noexcept override { return TensorLocation::kDEVICE; }
    DataType getTensorDataType(const char *name) const noexcept override {
        switch (of(name).type) {
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return DataType::kFLOAT;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return DataType::kINT64;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return DataType::kUINT8;
            default: return DataType::kBOOL;
        }
    }
    Dims getTensorShape(const char *name) const noexcept override { return of(name).dims; }
    IRuntimeConfig *createRuntimeConfig() noexcept override { return new HostConfig; }
    IExecutionContext *createExecutionContext(IRuntimeConfig *config) noexcept override;
};

struct HostContext : IExecutionContext, Counted {
    HostEngine &engine;
    std::map<std::string, Dims> shapes;
    std::map<std::string, void *> addresses;

    explicit HostContext(HostEngine &of) : engine(of) {
        ++contexts;
        for (const Io &io : engine.io)
            if (io.mode == TensorIOMode::kINPUT) shapes[io.name] = io.dims;
    }

    bool setInputShape(const char *name, const Dims &dims) noexcept override {
        shapes[name] = dims;
        for (const Io &io : engine.io)
            if (io.mode == TensorIOMode::kOUTPUT) shapes.erase(io.name);
        return true;
    }

    // By running on zeros.
    std::int32_t inferShapes(std::int32_t, const char **) noexcept override {
        std::map<std::string, std::vector<char>> zeros;
        std::map<std::string, void *> given;
        for (const auto &[name, dims] : shapes) {
            zeros[name].resize(bytes_of(engine.of(name), dims) + 1);
            given[name] = zeros[name].data();
        }
        try {
            for (auto &[name, value] : run(given, shapes)) {
                Dims dims{0, {}};
                for (const std::int64_t size : value.GetTensorTypeAndShapeInfo().GetShape()) dims.d[dims.nbDims++] = size;
                shapes[name] = dims;
            }
        } catch (const Ort::Exception &) {
            return -1;
        }
        return 0;
    }

    Dims getTensorShape(const char *name) const noexcept override { return shapes.at(name); }

    bool setTensorAddress(const char *name, void *address) noexcept override {
        addresses[name] = address;
        return reinterpret_cast<std::uintptr_t>(address) % 256 == 0;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (addresses.size() != engine.io.size()) return false;
        stream->work.push_back([this, where = addresses, of = shapes] {
            for (auto &[name, value] : run(where, of))
                std::memcpy(where.at(name), value.GetTensorRawData(), bytes_of(engine.of(name), of.at(name)));
        });
        return true;
    }

  private:
    std::map<std::string, Ort::Value> run(const std::map<std::string, void *> &where,
                                          const std::map<std::string, Dims> &of) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPUInput);
        std::vector<const char *> inputs, outputs;
        std::vector<Ort::Value> values;
        for (const Io &io : engine.io) {
            (io.mode == TensorIOMode::kINPUT ? inputs : outputs).push_back(io.name.c_str());
            if (io.mode != TensorIOMode::kINPUT) continue;
            const Dims &dims = of.at(io.name);
            values.push_back(Ort::Value::CreateTensor(memory, where.at(io.name), bytes_of(io, dims), dims.d,
                                                      static_cast<std::size_t>(dims.nbDims), io.type));
        }
        std::vector<Ort::Value> made = engine.session.Run(Ort::RunOptions(nullptr), inputs.data(), values.data(),
                                                          values.size(), outputs.data(), outputs.size());
        std::map<std::string, Ort::Value> results;
        for (std::size_t k = 0; k < made.size(); ++k) results.emplace(outputs[k], std::move(made[k]));
        return results;
    }
};

IExecutionContext *HostEngine::createExecutionContext(IRuntimeConfig *config) noexcept {
    const auto *chosen = static_cast<HostConfig *>(config);
    return chosen == nullptr || chosen->eager ? new HostContext(*this) : nullptr;
}

struct HostRuntime : IRuntime, Counted {
    ILogger &logger;

    explicit HostRuntime(ILogger &told) : logger(told) {}

    EngineValidity getEngineValidity(const void *plan, std::int64_t bytes, std::uint64_t *why) const noexcept override {
        const std::string_view text(static_cast<const char *>(plan), static_cast<std::size_t>(bytes));
        *why = static_cast<std::uint64_t>(EngineInvalidityDiagnostics::kUNSUPPORTED_CC);
        return text.substr(0, 7) == "invalid" ? EngineValidity::kINVALID : EngineValidity::kVALID;
    }

    ICudaEngine *deserializeCudaEngine(const void *plan, std::size_t bytes) noexcept override {
        try {
            return new HostEngine(plan, bytes);
        } catch (const Ort::Exception &error) {
            logger.log(ILogger::Severity::kERROR, error.what());
            logger.log(ILogger::Severity::kWARNING, "and that is all");
            return nullptr;
        }
    }
};

}  // namespace

IRuntime *createInferRuntime(ILogger &logger) noexcept { return new HostRuntime(logger); }

}  // namespace nvinfer1
