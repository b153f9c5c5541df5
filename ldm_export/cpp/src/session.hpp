// ONNX Runtime: sessions on the CPU or, where its CUDA provider works, on an NVIDIA GPU. No other file knows its types.
#pragma once

#include "graph.hpp"
#include "listed.hpp"

#include <memory>
#include <string>

namespace ldm::runtime {

enum class Device { cpu, cuda };

class OnnxRuntime {
  public:
    // threads: for one operator; 0 is one a physical core that this process may use. Throws BackendError if the ONNX
    // Runtime that was loaded is older than the headers this was built with.
    explicit OnnxRuntime(int threads);
    ~OnnxRuntime();
    OnnxRuntime(const OnnxRuntime &) = delete;
    OnnxRuntime &operator=(const OnnxRuntime &) = delete;

    static std::string version();
    static bool has_cuda();

    // Open a graph. Without a spec it is what the session says; else they must agree, or BundleError is thrown, as it is
    // where ONNX Runtime refuses the graph. Throws BackendError where CUDA does not start.
    std::unique_ptr<Graph> open(const GraphFiles &files, const std::string &path, const GraphSpec *spec, Device device) const;

  private:
    struct Settings;
    std::unique_ptr<Settings> settings_;
};

}  // namespace ldm::runtime
