// TensorRT engines of a bundle, under targets/<kind>/, and when they may be run, without TensorRT; as ldm_export/bundle/targets/engines.py.
#pragma once

#include "error.hpp"
#include "target_files.hpp"
#include "tensor.hpp"

#include <array>

namespace ldm::runtime {

// A library that engines are for.
struct Flavour {
    const char *backend;  // what users call it
    const char *library;  // its name
    const char *kind;     // what its targets are called after, and LDM_TENSORRT is set to
    bool any_device;      // builds for devices that are not there, and takes their compute capabilities
};
inline constexpr std::array<Flavour, 2> FLAVOURS{
    {{"tensorrt-rtx", "tensorrt_rtx", "rtx", true}, {"tensorrt", "tensorrt", "tensorrt", false}}};

// The flavour of a backend, or null.
const Flavour *flavour_of(const std::string &backend);

// The error for a flavour that this library was built without.
BackendError not_built_with(const Flavour &flavour);

// Of an input with free sizes: the smallest and largest shape that it may have, and the one that the engine is tuned for.
struct ShapeRange {
    Shape min, opt, max;
};

struct Engine {
    std::string path;                              // in the target's folder
    std::string source;                            // what it was built from: a graph of the bundle, or a loop's plan
    std::map<std::string, std::string> source_hashes;  // SHA-256 of each file of the bundle that it was made from
    std::vector<TensorSpec> inputs, outputs;       // each free size has a name of its own
    std::map<std::string, ShapeRange> profile;     // of each input with a free size

    // Throws InputError, which ends in what to run, unless the engine was built for this shape of an input.
    void check_shape(const std::string &input, const Shape &shape, const std::string &rebuild) const;
};

// What target.json says.
struct EngineDocument {
    std::string kind, flavour, version, precision;  // the library's name and whole version; fp32, fp16 or int8
    std::vector<std::string> compute_capabilities;
    bool stripped = false;  // whether the engines have no weights
    std::map<std::string, Engine> engines;  // by graph, such as "vae_decoder" or "loops/ddim-20"
    std::map<std::string, FileEntry> files;
};

struct EngineTarget {
    EngineDocument document;
    ListedFiles files;
};

// A target.json of engines, not yet held against the files beside it; throws MalformedError.
EngineDocument engines_from_json(std::string_view text, const std::string &kind);

// The kinds of a flavour's targets that a bundle has, whether they fit or not.
std::vector<std::string> engine_targets(const Bundle &bundle, const Flavour &flavour);

// What to type for engines that run on such a device.
std::string build_command(const Bundle &bundle, const Flavour &flavour, const std::string &compute_capability,
                          const std::string &precision = "fp32");

// The engines to run with this release on this device: sound, and of all graphs but loops. Throws BackendError where there
// are none; it says why of each target, and what to type.
EngineTarget fitting_engines(const Bundle &bundle, const Flavour &flavour, const std::string &version,
                             const std::string &compute_capability);

}  // namespace ldm::runtime
