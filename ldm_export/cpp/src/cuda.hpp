// The few parts of CUDA that running engines takes; as ldm_export/runtime/backends/cuda.py. The device is CUDA's first,
// which CUDA_VISIBLE_DEVICES chooses.
#pragma once

#include "error.hpp"
#include "tensor.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>

namespace ldm::runtime {

// Throws BackendError for any status but success.
inline void check_cuda(cudaError_t status, const char *function) {
    if (status == cudaSuccess) return;
    const auto mended = [](const std::string &how) {
        return BackendError(join("CUDA does not run here: ", how, ", or use the backend cpu."));
    };
    if (status == cudaErrorInsufficientDriver)
        throw mended(join("NVIDIA's driver is missing, or older than CUDA ", CUDART_VERSION / 1000, ".",
                          CUDART_VERSION % 1000 / 10, " needs. Install or update the driver"));
    if (status == cudaErrorNoDevice) throw mended("no NVIDIA GPU can be seen. Check nvidia-smi and CUDA_VISIBLE_DEVICES");
    if (status == cudaErrorMemoryAllocation)
        throw mended("the GPU's memory is full. Draw fewer or smaller pictures, or end other programs");
    throw BackendError(join("CUDA's ", function, " failed: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
                            "). Start anew; if it fails again, use the backend cpu and report it."));
}

inline bool driver_is_there() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version > 0;
}

struct Gpu {
    std::string name, compute_capability;  // such as "NVIDIA GeForce RTX 4090" and "8.9"
};

inline Gpu first_gpu() {
    int count = 0;  // asked for the error that says why there is none
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    cudaDeviceProp facts{};
    check_cuda(cudaGetDeviceProperties(&facts, 0), "cudaGetDeviceProperties");
    return {facts.name, join(facts.major, ".", facts.minor)};
}

// Work that is done in order, while the host goes on.
class Stream {
  public:
    Stream() { check_cuda(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
    ~Stream() { cudaStreamDestroy(handle_); }
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;

    cudaStream_t handle() const { return handle_; }
    void wait() const { check_cuda(cudaStreamSynchronize(handle_), "cudaStreamSynchronize"); }

  private:
    cudaStream_t handle_ = nullptr;
};

// Device memory.
class Buffer {
  public:
    explicit Buffer(std::size_t bytes) : bytes_(bytes) {
        check_cuda(cudaMalloc(&address_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    }
    ~Buffer() { cudaFree(address_); }  // which waits for what uses it
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    void *address() const { return address_; }
    std::size_t bytes() const { return bytes_; }

    // The array may be changed as soon as this returns: what lies in pageable memory is copied before.
    void upload(const Tensor &tensor, const Stream &stream) {
        check_cuda(cudaMemcpyAsync(address_, tensor.data.data(), bytes_, cudaMemcpyHostToDevice, stream.handle()),
                   "cudaMemcpyAsync");
    }
    // The array has the values once the stream was waited for.
    void download(Tensor &tensor, const Stream &stream) const {
        check_cuda(cudaMemcpyAsync(tensor.data.data(), address_, bytes_, cudaMemcpyDeviceToHost, stream.handle()),
                   "cudaMemcpyAsync");
    }

  private:
    void *address_ = nullptr;
    std::size_t bytes_;
};

}  // namespace ldm::runtime
