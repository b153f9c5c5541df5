// manifest.json: what a bundle says about itself; as ldm_export/bundle/manifest.py and contract.py.
#pragma once

#include "json.hpp"
#include "roles.hpp"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ldm::runtime {

constexpr const char *MANIFEST = "manifest.json";
constexpr const char *TARGETS = "targets";
constexpr std::int64_t LARGEST_SIZE = 1 << 20;  // of sizes, counts and factors that a manifest says

// A size, or the name of a free one.
struct Dimension {
    std::int64_t size = 0;
    std::string name{};  // empty: the size is fixed
    bool is_free() const { return !name.empty(); }
};

struct TensorSpec {
    std::string name;
    std::string dtype;  // numpy's name
    std::vector<Dimension> shape;
};

struct GraphSpec {
    std::string path;
    std::vector<TensorSpec> inputs, outputs;

    const TensorSpec *input(std::string_view name) const;  // null if there is none
    std::string name() const;                              // the folder that it is in; of a loop its file
};

// Whether a loaded graph has what the manifest gives it: the same names, types, ranks and fixed sizes.
bool agree(const std::vector<TensorSpec> &declared, const std::vector<TensorSpec> &there);

struct Manifest {
    std::map<std::string, FileEntry> files;
    std::map<std::string, GraphSpec> graphs;
    Json model;  // free facts
    std::optional<Roles> roles;  // none in a bundle that only holds graphs
    std::map<std::string, std::string> networks{};  // SHA-256 of the weights that graphs were exported from, where it says so
};

// Throws BundleError if the text is no manifest of this format version.
Manifest manifest_from_json(std::string_view text);

bool is_loop(std::string_view relative);

}  // namespace ldm::runtime
