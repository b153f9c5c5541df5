// What the graphs of a bundle must take and give to be used together; as ldm_export/runtime/facts.py.
#pragma once

#include "bundle.hpp"

#include <cstdint>
#include <string>

namespace ldm::runtime {

// A graph of the bundle; throws BundleError where there is none.
const GraphSpec &graph_of(const Bundle &bundle, const std::string &name);

// Hold every graph that pictures are generated with against its role: names, types, ranks, and sizes, free ones by the same
// name throughout a graph, and fixed ones as the other graphs have them. Throws BundleError.
void check_roles(const Bundle &bundle, std::int64_t latent_channels);

// Which graph fills which role; throws BundleError where the manifest says nothing of roles.
const Roles &roles_of(const Bundle &bundle);

}  // namespace ldm::runtime
