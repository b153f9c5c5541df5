#include "manifest.hpp"

#include "error.hpp"

#include <algorithm>
#include <array>
#include <set>

namespace ldm::runtime {

namespace {

constexpr std::int64_t FORMAT_VERSION = 2;
constexpr std::array KEYS{"files",  "format_version", "graphs", "ldm_export_version",
                          "model",  "parity",         "passes", "roles", "source"};

bool begins_with(std::string_view relative, std::string_view folder) {
    return relative.substr(0, relative.find('/')) == folder;
}

std::vector<TensorSpec> specs_of(const Json &entry, const char *side, const std::string &where) {
    std::vector<TensorSpec> specs;
    for (const Json &spec : field(entry, side, Kind::array, where).array()) {
        const std::string at = join(where, ".", side, "[", specs.size(), "]");
        TensorSpec tensor{field(spec, "name", Kind::text, at).text(), field(spec, "dtype", Kind::text, at).text(), {}};
        for (const Json &size : field(spec, "shape", Kind::array, at).array()) {
            if (size.is(Kind::integer) && size.integer() >= 0 && size.integer() <= LARGEST_SIZE)
                tensor.shape.push_back({size.integer()});
            else if (size.is(Kind::text) && !size.text().empty())
                tensor.shape.push_back({0, size.text()});
            else
                throw MalformedError(
                    join(at, " has the shape ", spec["shape"].dump().substr(0, 200), "; sizes are whole numbers from 0 to ", LARGEST_SIZE,
                         ", or names"));
        }
        if (tensor.name.empty()) throw MalformedError(at + " has no name");
        specs.push_back(std::move(tensor));
    }
    return specs;
}

// A record of how far an output of a graph is from the checkpoint's.
void check_record(const Json &record, const std::map<std::string, GraphSpec> &graphs) {
    const std::string where = "an entry of parity";
    const std::string &graph = field(record, "graph", Kind::text, where).text();
    const std::string &output = field(record, "output", Kind::text, where).text();
    const auto found = graphs.find(graph);
    if (found == graphs.end() || std::none_of(found->second.outputs.begin(), found->second.outputs.end(),
                                              [&](const TensorSpec &tensor) { return tensor.name == output; }))
        throw MalformedError(join(where, " is of '", output, "' of ", graph, ", which there is not"));
    for (const char *key : {"max_error", "tolerance"})
        if (const double number = field(record, key, Kind::number, where).number(); !(number >= 0 && number <= LARGEST_SIZE))
            throw MalformedError(join(where, " has ", key, " = ", number, "; it must be from 0 to ", LARGEST_SIZE));
    field(record, "passed", Kind::boolean, where);
    if (record.object().count("source_hashes") == 0) return;
    for (const auto &[path, sha256] : texts_of(record, "source_hashes", where))
        if (!is_sha256(sha256)) throw MalformedError(join(where, " was made of ", path, " with the SHA-256 '", sha256, "'"));
}

Manifest manifest_of(const Json &found) {
    check_kind(found, Kind::object, "");
    if (const Json &version = field(found, "format_version", Kind::integer); version.integer() != FORMAT_VERSION)
        throw BundleError(join(MANIFEST, " has format_version ", version.dump(), "; this ldm_export reads ", FORMAT_VERSION,
                               ". Export the bundle anew, or install the ldm_export that made it."));
    for (const auto &[key, _] : found.object())
        if (std::find(KEYS.begin(), KEYS.end(), key) == KEYS.end())
            throw MalformedError("the whole has the unknown key '" + key + "'");
    Manifest manifest{files_of(found), {}, field(found, "model", Kind::object), {}};
    for (const auto &[path, _] : manifest.files)
        if (path == MANIFEST || begins_with(path, TARGETS))
            throw MalformedError(
                join("the path '", path, "' is listed, but ", MANIFEST, " and what is under ", TARGETS, "/ never are"));
    for (const auto &[name, entry] : field(found, "graphs", Kind::object).object()) {
        const std::string where = "graphs['" + name + "']";
        const std::string &path = field(entry, "path", Kind::text, where).text();
        if (manifest.files.count(path) == 0)
            throw MalformedError(where + " has the path '" + path + "', which is not among the files");
        if (is_loop(name) && path != name + "/model.onnx" && path != name + ".onnx")
            throw MalformedError(where + " has the path '" + path + "'; it must be its name with /model.onnx or .onnx");
        const GraphSpec graph{path, specs_of(entry, "inputs", where), specs_of(entry, "outputs", where)};
        std::set<std::string> names;
        for (const auto *side : {&graph.inputs, &graph.outputs})
            for (const TensorSpec &tensor : *side)
                if (!names.insert(tensor.name).second) throw MalformedError(where + " has two tensors '" + tensor.name + "'");
        manifest.graphs.emplace(name, graph);
    }
    for (const Json &entry : field(found, "passes", Kind::array).array()) check_kind(entry, Kind::object, "an entry of passes");
    for (const Json &entry : field(found, "parity", Kind::array).array()) check_record(entry, manifest.graphs);
    if (found.object().count("roles") == 0) field(found, "roles", Kind::object);  // which says that it is missing
    if (!found["roles"].is_null()) manifest.roles = roles_from_json(found["roles"], manifest.graphs);
    const Json &source = field(found, "source", Kind::object);
    for (const auto &[name, _] : manifest.graphs) {
        const Json &component = source["components"][name];
        const Json &sha256 = source["sha256"][component.is(Kind::text) ? component.text() : name];
        if (sha256.is(Kind::text)) manifest.networks.emplace(name, sha256.text());
    }
    field(found, "ldm_export_version", Kind::text);
    return manifest;
}

}  // namespace

const TensorSpec *GraphSpec::input(std::string_view name) const {
    const auto found =
        std::find_if(inputs.begin(), inputs.end(), [&](const TensorSpec &tensor) { return tensor.name == name; });
    return found == inputs.end() ? nullptr : &*found;
}

std::string GraphSpec::name() const {
    for (const std::string_view end : {"/model.onnx", ".onnx"})
        if (path.size() > end.size() && path.compare(path.size() - end.size(), end.size(), end) == 0)
            return path.substr(0, path.size() - end.size());
    return path;
}

Manifest manifest_from_json(std::string_view text) {
    Json found;
    try {
        found = parsed(text, Repeats::refused);
    } catch (const MalformedError &error) {
        throw BundleError(join(MANIFEST, " is ", error.what(), ". Export the bundle anew."));
    }
    try {
        return manifest_of(found);
    } catch (const MalformedError &error) {
        throw BundleError(join(MANIFEST, ": ", error.what(), ". Export the bundle anew."));
    }
}

bool agree(const std::vector<TensorSpec> &declared, const std::vector<TensorSpec> &there) {
    const auto has = [&](const TensorSpec &tensor) {
        const auto found =
            std::find_if(there.begin(), there.end(), [&](const TensorSpec &one) { return one.name == tensor.name; });
        if (found == there.end() || found->dtype != tensor.dtype || found->shape.size() != tensor.shape.size()) return false;
        for (std::size_t k = 0; k < tensor.shape.size(); ++k)
            if (!tensor.shape[k].is_free() && (found->shape[k].is_free() || found->shape[k].size != tensor.shape[k].size))
                return false;
        return true;
    };
    return declared.size() == there.size() && std::all_of(declared.begin(), declared.end(), has);
}

bool is_loop(std::string_view relative) { return begins_with(relative, "loops"); }

}  // namespace ldm::runtime
