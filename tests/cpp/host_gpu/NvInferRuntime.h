// Of TensorRT, what the library calls: declarations for host_gpu.cpp alone, of other layouts and values than NVIDIA's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

enum class DataType { kFLOAT, kHALF, kINT64, kUINT8, kBOOL };
enum class TensorIOMode { kINPUT, kOUTPUT };
enum class TensorLocation { kDEVICE, kHOST };
enum class DynamicShapesKernelSpecializationStrategy { kLAZY, kEAGER };
enum class EngineValidity { kVALID, kINVALID };
enum class EngineInvalidityDiagnostics : std::uint64_t {
    kVERSION_MISMATCH = 1,
    kUNSUPPORTED_CC = 2,
    kOLD_CUDA_DRIVER = 4,
    kOLD_CUDA_RUNTIME = 8,
    kINSUFFICIENT_GPU_MEMORY = 16,
    kMALFORMED_ENGINE = 32,
    kCUDA_ERROR = 64
};
struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};

class ILogger {
  public:
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
    virtual ~ILogger() = default;
    virtual void log(Severity severity, const char *text) noexcept = 0;
};

class IRuntimeConfig {
  public:
    virtual ~IRuntimeConfig() = default;
    virtual void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) noexcept = 0;
};

class IExecutionContext {
  public:
    virtual ~IExecutionContext() = default;
    virtual bool setInputShape(const char *name, const Dims &dims) noexcept = 0;
    virtual std::int32_t inferShapes(std::int32_t most_names, const char **names) noexcept = 0;
    virtual Dims getTensorShape(const char *name) const noexcept = 0;
    virtual bool setTensorAddress(const char *name, void *address) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
  public:
    virtual ~ICudaEngine() = default;
    virtual std::int32_t getNbIOTensors() const noexcept = 0;
    virtual const char *getIOTensorName(std::int32_t index) const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(const char *name) const noexcept = 0;
    virtual TensorLocation getTensorLocation(const char *name) const noexcept = 0;
    virtual DataType getTensorDataType(const char *name) const noexcept = 0;
    virtual Dims getTensorShape(const char *name) const noexcept = 0;
    virtual IRuntimeConfig *createRuntimeConfig() noexcept = 0;
    virtual IExecutionContext *createExecutionContext(IRuntimeConfig *config = nullptr) noexcept = 0;
};

class IRuntime {
  public:
    virtual ~IRuntime() = default;
    virtual EngineValidity getEngineValidity(const void *plan, std::int64_t bytes, std::uint64_t *why) const noexcept = 0;
    virtual ICudaEngine *deserializeCudaEngine(const void *plan, std::size_t bytes) noexcept = 0;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;

}  // namespace nvinfer1
