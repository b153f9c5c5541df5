#include "engines.hpp"

#include <algorithm>
#include <set>
#include <system_error>

namespace ldm::runtime {

namespace {

constexpr std::array PRECISIONS{"fp16", "int8", "fp32"};  // the fastest first

template <class Map>
std::vector<std::string> keys_of(const Map &map) {
    std::vector<std::string> keys;
    for (const auto &[key, _] : map) keys.push_back(key);
    return keys;
}

std::string sizes_of(const Shape &shape) {
    std::vector<std::string> sizes;
    for (const std::int64_t size : shape) sizes.push_back(std::to_string(size));
    return "(" + listed(sizes) + ")";
}

Shape shape_of(const Json &holder, const char *key, const std::string &where) {
    Shape shape;
    for (const Json &size : field(holder, key, Kind::array, where).array()) {
        check_kind(size, Kind::integer, join(where, ".", key));
        shape.push_back(size.integer());
    }
    return shape;
}

std::vector<TensorSpec> tensors_of(const Json &entry, const char *side, const std::string &engine) {
    const std::string where = join(engine, ".", side);
    std::vector<TensorSpec> tensors;
    for (const Json &found : field(entry, side, Kind::array, engine).array()) {
        TensorSpec tensor{
            field(found, "name", Kind::text, where).text(), field(found, "dtype", Kind::text, where).text(), {}};
        for (const std::int64_t size : shape_of(found, "shape", where)) {
            if (size < -1) throw MalformedError(join(where, " has a size of ", size, "; sizes are from 0, or -1 if free"));
            const std::string name = size < 0 ? join(tensor.name, ".", tensor.shape.size()) : "";
            tensor.shape.push_back({std::max<std::int64_t>(size, 0), name});
        }
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

// As target.json has them, -1 if free.
Shape sizes_in(const TensorSpec &tensor) {
    Shape shape;
    for (const Dimension &size : tensor.shape) shape.push_back(size.is_free() ? -1 : size.size);
    return shape;
}

bool is_free(const TensorSpec &tensor) {
    return std::any_of(tensor.shape.begin(), tensor.shape.end(), [](const Dimension &size) { return size.is_free(); });
}

// As many sizes, 1 <= min <= opt <= max, and the fixed ones as they are.
bool fits(const TensorSpec &tensor, const ShapeRange &range) {
    const std::size_t rank = tensor.shape.size();
    if (range.min.size() != rank || range.opt.size() != rank || range.max.size() != rank) return false;
    for (std::size_t k = 0; k < rank; ++k) {
        const std::int64_t low = range.min[k], best = range.opt[k], high = range.max[k];
        if (low < 1 || low > best || best > high) return false;
        if (!tensor.shape[k].is_free() && (low != high || low != tensor.shape[k].size)) return false;
    }
    return true;
}

Engine engine_of(const Json &entry, const std::string &where) {
    Engine engine{field(entry, "path", Kind::text, where).text(), field(entry, "source", Kind::text, where).text(),
                  texts_of(entry, "source_hashes", where),            tensors_of(entry, "inputs", where),
                  tensors_of(entry, "outputs", where),            {}};
    for (const auto &[name, range] : field(entry, "profile", Kind::object, where).object()) {
        const std::string at = where + ".profile['" + name + "']";
        engine.profile.emplace(
            name, ShapeRange{shape_of(range, "min", at), shape_of(range, "opt", at), shape_of(range, "max", at)});
    }
    field(entry, "seconds", Kind::number, where);
    return engine;
}

void check_profile(const std::string &name, const Engine &engine) {
    if (engine.source_hashes.count(engine.source) == 0) throw PassedOver("its " + name + " does not say what it was made from");
    std::vector<std::string> free;
    for (const TensorSpec &tensor : engine.inputs)
        if (is_free(tensor)) free.push_back(tensor.name);
    std::sort(free.begin(), free.end());
    if (keys_of(engine.profile) != free)
        throw PassedOver(join("its ", name, " has a profile for ", listed(keys_of(engine.profile), "nothing"),
                              ", and free sizes in ", listed(free, "nothing")));
    for (const TensorSpec &tensor : engine.inputs) {
        if (!is_free(tensor)) continue;
        const ShapeRange &range = engine.profile.at(tensor.name);
        if (!fits(tensor, range))
            throw PassedOver(join("its ", name, " takes ", tensor.name, " of ", sizes_of(sizes_in(tensor)),
                                  ", and has a profile of ", sizes_of(range.min), ", ", sizes_of(range.opt), " and ",
                                  sizes_of(range.max), " for it"));
    }
}

std::string without_dots(std::string text) {
    text.erase(std::remove(text.begin(), text.end(), '.'), text.end());
    return text;
}

std::string kind_of(const Flavour &flavour, const EngineDocument &target) {
    std::string kind = flavour.kind;
    for (const std::string &capability : target.compute_capabilities) kind += "-sm" + without_dots(capability);
    return target.precision == "fp32" ? kind : kind + "-" + target.precision;
}

// Throws PassedOver unless the target is sound and of this bundle, release and device.
EngineTarget read_engines(const Bundle &bundle, const std::string &kind, const std::string &version,
                          const std::string &compute_capability) {
    EngineDocument target;
    ListedFiles files = read_target_files(bundle, kind, [&](const std::string &text) {
        target = engines_from_json(text, kind);
        return target.files;
    });
    for (const auto &[_, engine] : target.engines)
        if (!files.has(engine.path)) throw PassedOver("its " + engine.path + " is missing");
    for (const auto &[name, engine] : target.engines) check_profile(name, engine);
    if (target.version != version)
        throw PassedOver(join("it was made with ", target.flavour, " ", target.version, ", and this is ", version));
    const std::vector<std::string> &able = target.compute_capabilities;
    if (std::find(able.begin(), able.end(), compute_capability) == able.end())
        throw PassedOver(
            join("it was made for compute capability ", listed(able), ", and this device has ", compute_capability));
    for (const auto &[name, engine] : target.engines)
        for (const auto &[path, sha256] : engine.source_hashes)
            if (!bundle.files.has(path) || bundle.manifest.files.at(path).sha256 != sha256)
                throw PassedOver("its " + name + " was made from other graphs");
    for (const auto &[name, graph] : bundle.manifest.graphs)
        if (!is_loop(graph.path) && target.engines.count(name) == 0) throw PassedOver("it has no engine of " + name);
    if (target.stripped) throw PassedOver("its engines have no weights");
    return {std::move(target), std::move(files)};
}

}  // namespace

const Flavour *flavour_of(const std::string &backend) {
    const auto *found =
        std::find_if(FLAVOURS.begin(), FLAVOURS.end(), [&](const Flavour &one) { return backend == one.backend; });
    return found == FLAVOURS.end() ? nullptr : found;
}

BackendError not_built_with(const Flavour &flavour) {
    return BackendError(join(flavour.backend, " was asked for, and this library was built without it. Build it with "
                             "-DLDM_TENSORRT=", flavour.kind, ", or use another backend."));
}

void Engine::check_shape(const std::string &input, const Shape &shape, const std::string &rebuild) const {
    const auto range = profile.find(input);
    if (range == profile.end()) return;
    const auto &[low, _, high] = range->second;
    bool inside = shape.size() == low.size();
    for (std::size_t k = 0; k < low.size() && inside; ++k) inside = low[k] <= shape[k] && shape[k] <= high[k];
    if (!inside)
        throw InputError(join(path, " would be given '", input, "' of shape ", sizes_of(shape), "; it was built for ",
                              sizes_of(low), " to ", sizes_of(high), ". Ask for pictures of such a size and number, use "
                              "another backend, or run, with a larger --batch or --size: ", rebuild));
}

EngineDocument engines_from_json(std::string_view text, const std::string &kind) {
    const Json document = target_document(text, kind);
    EngineDocument target;
    target.kind = kind;
    target.flavour = field(document, "flavour", Kind::text).text();
    target.version = field(document, "version", Kind::text).text();
    target.precision = field(document, "precision", Kind::text).text();
    for (const Json &capability : field(document, "compute_capabilities", Kind::array).array()) {
        check_kind(capability, Kind::text, "compute_capabilities");
        target.compute_capabilities.push_back(capability.text());
    }
    if (std::none_of(FLAVOURS.begin(), FLAVOURS.end(), [&](const Flavour &one) {
            return target.flavour == one.library && kind_of(one, target) == target.kind;
        }))
        throw MalformedError(join("it is for ", target.flavour, ", ", listed(target.compute_capabilities), " in ",
                                  target.precision));
    for (const char *name : {"refittable", "sparse"}) field(document, name, Kind::boolean);
    target.stripped = field(document, "stripped", Kind::boolean).boolean();
    for (const auto &[name, entry] : field(document, "engines", Kind::object).object())
        target.engines.emplace(name, engine_of(entry, "engines['" + name + "']"));
    for (const auto &[graph, report] : field(document, "report", Kind::object).object())
        check_kind(report, Kind::object, "report." + graph);
    target.files = files_of(document);
    return target;
}

std::vector<std::string> engine_targets(const Bundle &bundle, const Flavour &flavour) {
    std::vector<std::string> kinds;
    for (const std::string &name : names_in(bundle.path() / TARGETS))
        if (name.rfind(join(flavour.kind, "-sm"), 0) == 0) kinds.push_back(name);
    return kinds;
}

std::string build_command(const Bundle &bundle, const Flavour &flavour, const std::string &compute_capability,
                          const std::string &precision) {
    const std::string models = flavour.any_device ? " --sm " + without_dots(compute_capability) : "";
    return join("ldm-export build ", bundle.path().string(), " --target ", flavour.kind, models,
                precision == "fp32" ? "" : " --precision " + precision);
}

EngineTarget fitting_engines(const Bundle &bundle, const Flavour &flavour, const std::string &version,
                             const std::string &compute_capability) {
    std::vector<EngineTarget> fitting;
    std::vector<std::string> reasons;
    for (const std::string &kind : engine_targets(bundle, flavour)) {
        try {
            fitting.push_back(read_engines(bundle, kind, version, compute_capability));
        } catch (const PassedOver &why) {
            reasons.push_back(join("targets/", kind, " does not fit: ", why.what()));
        }
    }
    if (fitting.empty())
        throw BackendError(join(bundle.path().string(), " has no ", flavour.library, " engines for this GPU",
                                reasons.empty() ? "" : " (" + listed(reasons) + ")", ". Run: ",
                                build_command(bundle, flavour, compute_capability)));
    const auto rank = [](const EngineTarget &target) {
        return std::find(PRECISIONS.begin(), PRECISIONS.end(), target.document.precision) - PRECISIONS.begin();
    };
    return *std::min_element(fitting.begin(), fitting.end(),
                             [&](const EngineTarget &one, const EngineTarget &other) { return rank(one) < rank(other); });
}

}  // namespace ldm::runtime
