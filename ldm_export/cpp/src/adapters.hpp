// Adapters that are given when a picture is drawn: read from their files, and laid out as a graph's branches take them; as
// ldm_export/bundle/adapters.py, whose docstring has the file's form.
#pragma once

#include "bundle.hpp"
#include "tensor.hpp"

#include <ldm/ldm.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

// What an adapter has for one layer, float32; of DoRA alone also a magnitude for each output, and the norms of the weight's
// rows, of their product with the change's, and of those.
struct LayerFactors {
    Tensor down, up;
    std::optional<Tensor> magnitude, norms;

    std::int64_t rank() const { return down.shape[down.shape.size() == 2 ? 1 : 0]; }
};

struct Adapter {
    using Factors = std::map<std::string, LayerFactors>;  // by layer

    fs::path path;
    std::string key;                              // of this file as it is now: no other has the same
    std::map<std::string, std::string> networks;  // SHA-256 of the weights that it was made for, by graph
    std::map<std::string, Factors> factors;       // by graph
};

// What one picture is drawn with: adapters and their strengths.
using Mixture = std::vector<std::pair<std::shared_ptr<const Adapter>, double>>;

// What each of `count` pictures is drawn with, checked against the bundle. Throws InputError.
std::vector<Mixture> mixtures_for(const Bundle &bundle, const ldm_draw_options &options, std::size_t count);

// Whether an adapter of any row changes a graph.
bool changes(const std::vector<Mixture> &rows, const std::string &graph);

// Whether an input of a graph is one of a branch for adapters.
bool is_branch_input(const std::string &name);

// The inputs of a graph's branches, for a call of as many rows. Throws InputError where an adapter changes a layer that has
// no branch, or has factors of other shapes.
Tensors branch_arrays(const GraphSpec &graph, const std::string &name, const std::vector<Mixture> &rows);

}  // namespace ldm::runtime
