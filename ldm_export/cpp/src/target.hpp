// The target ort-cpu, which is made of a bundle for one kind of machine, and when it may be used; as ldm_export/bundle/targets/base.py.
#pragma once

#include "target_files.hpp"

#include <optional>
#include <string_view>

namespace ldm::runtime {

constexpr const char *ORT_CPU = "ort-cpu";

// The plain graphs with branches for adapters, and those as ort-cpu has them; of graphs that some adapter changes.
constexpr const char *ADAPTERS = "adapters", *ADAPTERS_ORT_CPU = "adapters-ort-cpu";

struct TargetGraph {
    std::string path;                         // of what is run in every call
    std::map<std::string, std::string> hoisted;  // {input: path of the graph that depends on that input alone}
    std::string shallow;                      // the outermost blocks alone, which take "deep"; empty: there are none
    std::int64_t deep_channels;               // of "deep", which else has the latents' sizes

    std::vector<std::string> paths() const;
};

// What target.json says.
struct TargetDocument {
    std::map<std::string, TargetGraph> graphs;
    std::map<std::string, std::string> needs, source_hashes;
    std::map<std::string, FileEntry> files;
};

struct Target {
    std::map<std::string, TargetGraph> graphs;
    ListedFiles files;
};

// The bundle's target for this machine and this release of ONNX Runtime, or none; throws PassedOver.
std::optional<Target> read_target(const Bundle &bundle, const std::string &onnxruntime);

// The plain graphs with branches for adapters; those of them for this machine. None where there are none; throw PassedOver.
std::optional<Target> read_adapters(const Bundle &bundle);
std::optional<Target> read_adapters_ort_cpu(const Bundle &bundle, const Target &adapters, const std::string &onnxruntime);

// A target.json, not yet held against the files beside it; throws MalformedError.
TargetDocument target_from_json(std::string_view text, const std::string &kind = ORT_CPU);

// The kind of processor from the text of Linux's /proc/cpuinfo; empty if that names no vector instructions.
std::string cpu_level(const std::string &cpuinfo);

}  // namespace ldm::runtime
