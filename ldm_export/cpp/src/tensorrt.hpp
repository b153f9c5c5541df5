// TensorRT: a bundle's engines on the first GPU, where this library is built with LDM_TENSORRT; as
// ldm_export/runtime/backends/tensorrt.py. No other file knows its types, nor CUDA's.
#pragma once

#include "engines.hpp"
#include "graph.hpp"

#include <memory>
#include <string>

namespace ldm::runtime {

class Engines {
  public:
    virtual ~Engines() = default;

    virtual std::string name() const = 0;  // such as "tensorrt_rtx 1.7.1.116 rtx-sm89-fp16 NVIDIA GeForce RTX 4090"
    virtual const EngineTarget &target() const = 0;

    // Open the engine of a graph, which must be what `spec` says. Throws BackendError, also where the target has none.
    virtual std::unique_ptr<Graph> open(const std::string &graph, const GraphSpec &spec) const = 0;
};

// Whether there are a driver and engines of the flavour that this library is built with.
bool may_run_engines(const Bundle &bundle);

// The bundle's engines for this GPU: of a flavour, or, where that is null, of the one that this library is built with.
// Throws BackendError.
std::unique_ptr<Engines> open_engines(const Bundle &bundle, const Flavour *flavour);

}  // namespace ldm::runtime
