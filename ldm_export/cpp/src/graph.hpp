// A loaded graph: run it once into new arrays, or bind arrays and call it as often as is needed.
#pragma once

#include "cache.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

#include <functional>
#include <memory>
#include <mutex>
#include <set>

namespace ldm::runtime {

using Call = std::function<void()>;

class Graph {
  public:
    explicit Graph(GraphSpec spec) : spec_(std::move(spec)) {}
    virtual ~Graph() = default;
    Graph(const Graph &) = delete;
    Graph &operator=(const Graph &) = delete;

    const GraphSpec &spec() const { return spec_; }

    // Any thread may run and bind; a call that was bound is made from one at a time. Both throw BackendError.
    virtual Tensors run(const TensorRefs &inputs) const = 0;

    // A call that reads `inputs` and writes `outputs` where they lie. Only the inputs that `changes` names may be of other
    // values from call to call. With `every` > 1 the first and then every so many calls are of the whole graph, those
    // between of its outermost blocks.
    virtual Call bind(const TensorRefs &inputs, const TensorRefs &outputs, std::size_t every = 1) const = 0;

    virtual bool can_skip() const { return false; }  // whether `every` may be more than 1

    // Throws InputError where an input cannot have this shape; most graphs take any.
    virtual void check_shape(const std::string &, const Shape &) const {}

    static bool changes(const std::string &input) { return input == "sample" || input == "timestep"; }

  private:
    GraphSpec spec_;
};

// An output of a graph, which must have this type and shape; throws BundleError.
Tensor expected(Tensors outputs, const GraphSpec &graph, const std::string &name, const char *dtype, const Shape &shape);

// A graph with its invariants hoisted out of the sampling loop: what depends on a condition alone runs once a binding,
// what depends on the timestep alone once for each timestep.
class HoistedGraph : public Graph {
  public:
    using Parts = std::map<std::string, std::unique_ptr<Graph>>;  // by the one input that each depends on

    // `rest` takes the graph's own inputs and what the parts give; `shallow`, which may be null, is its outermost blocks,
    // which take what `rest` gives as "deep" (B, deep_channels, h, w). Throws BundleError unless they are one of `spec`.
    HoistedGraph(GraphSpec spec, std::unique_ptr<Graph> rest, Parts parts, std::unique_ptr<Graph> shallow,
              std::int64_t deep_channels);

    Tensors run(const TensorRefs &inputs) const override;
    Call bind(const TensorRefs &inputs, const TensorRefs &outputs, std::size_t every) const override;
    bool can_skip() const override { return shallow_ != nullptr; }

  private:
    struct Known {
        std::mutex mutex;
        Cache<std::string, SharedTensors> results{1024};
    };

    void check_parts() const;
    Tensors results(const std::string &part, Tensor &value) const;
    SharedTensors row(const std::string &part, const Tensor &value, std::size_t number) const;

    std::unique_ptr<Graph> rest_;
    Parts parts_;
    std::unique_ptr<Graph> shallow_;
    std::int64_t deep_channels_;
    std::unique_ptr<Known> known_ = std::make_unique<Known>();  // of rows of one number, by part and value
};

}  // namespace ldm::runtime
