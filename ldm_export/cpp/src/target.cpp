#include "target.hpp"

#include "error.hpp"
#include "sha256.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include <sys/utsname.h>

namespace ldm::runtime {

namespace {

std::vector<std::string> names_of(const std::map<std::string, TargetGraph> &graphs) {
    std::vector<std::string> names;
    for (const auto &[name, _] : graphs) names.push_back(name);
    return names;
}

std::string trimmed(const std::string &text) {
    const std::size_t first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

bool is_vector_flag(const std::string &field, const std::string &flag) {
    const auto any = [&](std::initializer_list<const char *> starts) {
        return std::any_of(starts.begin(), starts.end(), [&](const char *start) { return flag.rfind(start, 0) == 0; });
    };
    if (field == "flags") return any({"amx", "avx", "fma", "sse4"});
    return any({"asimd", "neon", "sme", "sve"}) || flag == "bf16" || flag == "fphp" || flag == "i8mm";
}

std::string this_cpu() {
    std::ifstream stream("/proc/cpuinfo");
    const std::string level = cpu_level({std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()});
    struct utsname system {};
    if (level.empty() || ::uname(&system) != 0) throw PassedOver("this system does not tell the kind of its processor");
    return std::string(system.machine) + " " + level;
}

// The hashes of all files that a bundle's graphs consist of.
std::map<std::string, std::string> sources_of(const Bundle &bundle) {
    std::map<std::string, std::string> sources;
    std::set<std::string> graphs;
    for (const auto &[_, graph] : bundle.manifest.graphs) graphs.insert(graph.path);
    for (const auto &[path, entry] : bundle.manifest.files) {
        const bool data = path.size() >= 10 && path.compare(path.size() - 10, 10, ".onnx_data") == 0;
        if ((graphs.count(path) != 0 || data) && !is_loop(path)) sources.emplace(path, entry.sha256);
    }
    return sources;
}

}  // namespace

std::vector<std::string> TargetGraph::paths() const {
    std::vector<std::string> found{path};
    for (const auto &[_, part] : hoisted) found.push_back(part);
    if (!shallow.empty()) found.push_back(shallow);
    return found;
}

namespace {

// A target that needs just this, such as a release of a library, by name.
std::optional<Target> read(const Bundle &bundle, const std::string &kind, const std::map<std::string, std::string> &has) {
    if (fs::symlink_status(bundle.path() / TARGETS / kind).type() == fs::file_type::not_found) return std::nullopt;
    TargetDocument target;
    ListedFiles files = read_target_files(bundle, kind, [&](const std::string &text) {
        target = target_from_json(text, kind);
        return target.files;
    });
    for (const auto &[name, graph] : target.graphs)
        if (graph.shallow.empty() ? graph.deep_channels != 0 : graph.deep_channels < 1)
            throw PassedOver(join("its ", name, " has ", graph.deep_channels, " channels of what its outermost blocks take"));
    for (const auto &[_, graph] : target.graphs)
        for (const std::string &path : graph.paths()) {
            if (!files.has(path)) throw PassedOver("its " + path + " is missing");
            try {
                files.check_graph(path);
            } catch (const BundleError &error) {
                throw PassedOver(error.what());
            }
        }
    if (target.source_hashes != sources_of(bundle)) throw PassedOver("it was made from other graphs");
    if (target.needs.size() != has.size()) {
        std::vector<std::string> names;
        for (const auto &[name, _] : has) names.push_back(name);
        throw PassedOver(join("it says not just of ", listed(names, "nothing"), " what it needs"));
    }
    for (const auto &[name, given] : has) {
        const auto wanted = target.needs.find(name);
        if (wanted == target.needs.end()) throw PassedOver("it does not say for which " + name + " it was made");
        if (wanted->second != given)
            throw PassedOver(join("it was made for ", name, " ", wanted->second, ", and this is ", given));
    }
    std::vector<std::string> own;
    for (const auto &[name, graph] : bundle.manifest.graphs)
        if (!is_loop(graph.path)) own.push_back(name);
    const std::vector<std::string> there = names_of(target.graphs);
    const bool some = kind != ORT_CPU && std::includes(own.begin(), own.end(), there.begin(), there.end());
    if (there != own && !some)
        throw PassedOver(join("it has the graphs ", listed(there, "nothing"), ", and the bundle ",
                              listed(own, "nothing")));
    return Target{std::move(target.graphs), std::move(files)};
}

}  // namespace

std::optional<Target> read_target(const Bundle &bundle, const std::string &onnxruntime) {
    return read(bundle, ORT_CPU, {{"cpu", this_cpu()}, {"onnxruntime", onnxruntime}});
}

std::optional<Target> read_adapters(const Bundle &bundle) { return read(bundle, ADAPTERS, {}); }

std::optional<Target> read_adapters_ort_cpu(const Bundle &bundle, const Target &adapters, const std::string &onnxruntime) {
    std::set<std::string> paths;
    for (const auto &[_, graph] : adapters.graphs)
        for (const std::string &path : graph.paths()) paths.insert(path);
    Sha256 hashes;  // of the very graphs with branches that it was made from
    for (const std::string &path : paths) hashes.update(adapters.files.entries().at(path).sha256);
    return read(bundle, ADAPTERS_ORT_CPU,
                {{"cpu", this_cpu()}, {"onnxruntime", onnxruntime}, {ADAPTERS, hashes.hex_digest()}});
}

TargetDocument target_from_json(std::string_view text, const std::string &kind) {
    const Json document = target_document(text, kind);
    TargetDocument target{{}, texts_of(document, "needs"), texts_of(document, "source_hashes"), files_of(document)};
    for (const auto &[name, entry] : field(document, "graphs", Kind::object).object()) {
        const std::string where = "graphs['" + name + "']";
        target.graphs.emplace(name, TargetGraph{field(entry, "path", Kind::text, where).text(),
                                                texts_of(entry, "hoisted", where),
                                                field(entry, "shallow", Kind::text, where).text(),
                                                field(entry, "deep_channels", Kind::integer, where).integer()});
    }
    field(document, "report", Kind::object);
    return target;
}

std::string cpu_level(const std::string &cpuinfo) {
    static const std::set<std::string> model{"vendor_id", "cpu family", "model", "CPU implementer", "CPU part"};
    std::vector<std::string> models;
    std::set<std::string> vectors;
    std::istringstream lines(cpuinfo);
    for (std::string line; std::getline(lines, line);) {
        const std::size_t colon = std::min(line.find(':'), line.size());
        const std::string name = trimmed(line.substr(0, colon));
        const std::string value = trimmed(colon < line.size() ? line.substr(colon + 1) : "");
        if (model.count(name) != 0 && std::find(models.begin(), models.end(), value) == models.end())
            models.push_back(value);
        if (name != "flags" && name != "Features") continue;
        std::istringstream flags(value);
        for (std::string flag; flags >> flag;)
            if (is_vector_flag(name, flag)) vectors.insert(flag);
    }
    if (vectors.empty()) return "";
    std::string listed;
    for (const std::string &word : models) listed += word + " ";
    for (const std::string &word : vectors) listed += word + " ";
    listed.pop_back();
    return listed;
}

}  // namespace ldm::runtime
