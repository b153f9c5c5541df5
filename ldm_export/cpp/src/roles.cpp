#include "roles.hpp"

#include "error.hpp"
#include "listed.hpp"
#include "manifest.hpp"

#include <algorithm>

namespace ldm::runtime {

namespace {

const std::map<std::string, GuidanceKind> KINDS{
    {"three_rows", GuidanceKind::three_rows}, {"two_rows", GuidanceKind::two_rows}, {"input", GuidanceKind::input}, {"none", GuidanceKind::none}};

// Throws unless an object has exactly these keys.
void check_keys(const Json &entry, const std::set<std::string> &known, const std::string &where) {
    std::set<std::string> given;
    for (const auto &[key, _] : entry.object()) given.insert(key);
    if (given != known) throw MalformedError(join(where, " has the keys ", listed(given), "; ", listed(known), " are needed"));
}

Guidance guidance_of(const Json &entry) {
    const std::string where = "roles.guidance";
    check_keys(entry, {"kind", "scale"}, where);
    const std::string &kind = field(entry, "kind", Kind::text, where).text();
    const double scale = field(entry, "scale", Kind::number, where).number();
    const auto found = KINDS.find(kind);
    if (found == KINDS.end()) throw MalformedError(join(where, ".kind is '", kind, "'; there are three_rows, two_rows, input, none"));
    if (!(scale >= 0 && scale <= LARGEST_SIZE))
        throw MalformedError(join(where, ".scale is ", scale, "; a number from 0 to ", LARGEST_SIZE, " is needed"));
    return {found->second, scale};
}

TextEncoder text_encoder_of(const Json &entry, const std::string &where) {
    check_kind(entry, Kind::object, where);
    check_keys(entry, {"graph", "tokenizer", "kind", "length"}, where);
    const Json &length = field(entry, "length", Kind::integer, where);
    if (length.integer() < LEAST_TOKENS || length.integer() > LARGEST_SIZE)
        throw MalformedError(join(where, ".length is ", length.dump(), "; ", LEAST_TOKENS, " to ", LARGEST_SIZE, " is needed"));
    TextEncoder encoder{field(entry, "graph", Kind::text, where).text(), field(entry, "tokenizer", Kind::text, where).text(),
                        field(entry, "kind", Kind::text, where).text(), length.integer()};
    check_path(encoder.tokenizer);
    return encoder;
}

}  // namespace

std::vector<std::string> Roles::graphs() const {
    std::vector<std::string> names;
    for (const TextEncoder &encoder : text_encoders) names.push_back(encoder.graph);
    if (!conditioner.empty()) names.push_back(conditioner);
    names.insert(names.end(), {denoiser, vae_decoder, vae_encoder});
    return names;
}

std::set<std::string> Roles::sources(const GraphSpecs &all) const {
    std::set<std::string> found;
    for (const auto &[_, source] : conditions)
        if (source.rfind("conditioner.", 0) != 0) found.insert(source);
    if (!conditioner.empty())
        for (const TensorSpec &tensor : all.at(conditioner).inputs) found.insert(tensor.name);
    return found;
}

Roles roles_from_json(const Json &entry, const GraphSpecs &graphs) {
    check_kind(entry, Kind::object, "roles");
    for (const char *key : {"controls", "image_encoder"})  // what a picture says would be left out
        if (entry.object().count(key) != 0)
            throw BundleError(join("This bundle has ", key == std::string("controls") ? "ControlNets" : "an IP-Adapter",
                                   ", which the C++ runtime does not run. Export the model without, or use the Python runtime."));
    check_keys(entry,
               {"denoiser", "vae_decoder", "vae_encoder", "guidance", "text_encoders", "conditioner", "conditions"}, "roles");
    Roles roles;
    roles.guidance = guidance_of(field(entry, "guidance", Kind::object, "roles"));
    for (const Json &encoder : field(entry, "text_encoders", Kind::array, "roles").array())
        roles.text_encoders.push_back(text_encoder_of(encoder, join("roles.text_encoders[", roles.text_encoders.size(), "]")));
    roles.conditions = texts_of(entry, "conditions", "roles");
    roles.denoiser = field(entry, "denoiser", Kind::text, "roles").text();
    roles.vae_decoder = field(entry, "vae_decoder", Kind::text, "roles").text();
    roles.vae_encoder = field(entry, "vae_encoder", Kind::text, "roles").text();
    if (!entry["conditioner"].is_null()) {
        roles.conditioner = field(entry, "conditioner", Kind::text, "roles").text();
        if (roles.conditioner.empty()) throw MalformedError("roles has the graph '', which there is not");
    }
    std::set<std::string> seen;
    for (const std::string &name : roles.graphs()) {
        const auto found = graphs.find(name);
        if (found == graphs.end() || name.find('/') != std::string::npos)
            throw MalformedError(join("roles has the graph '", name, "', which there is not"));
        if (found->second.path != name + "/model.onnx")
            throw MalformedError(join("graphs['", name, "'] has the path '", found->second.path, "'; it must be ", name, "/model.onnx"));
        if (!seen.insert(name).second) throw MalformedError("roles has one graph in two roles");
    }
    return roles;
}

const TensorSpec *labels_of(const Roles &roles, const GraphSpecs &graphs) {
    for (const auto &[name, source] : roles.conditions)
        if (source == "class_labels") return graphs.at(roles.denoiser).input(name);
    return roles.conditioner.empty() ? nullptr : graphs.at(roles.conditioner).input("class_labels");
}

}  // namespace ldm::runtime
