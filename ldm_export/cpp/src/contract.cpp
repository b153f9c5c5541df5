#include "contract.hpp"

#include "error.hpp"
#include "tokenizer.hpp"

#include <algorithm>
#include <map>
#include <set>

namespace ldm::runtime {

namespace {

constexpr std::int64_t GREY = 1, COLOUR = 3;  // channels of pictures

const Dimension BATCH{0, "batch"}, HEIGHT{0, "height"}, WIDTH{0, "width"}, ROWS{0, "image_height"}, COLUMNS{0, "image_width"};
const Dimension ANY{0, ""};  // a fixed size of whatever value

std::string described(const TensorSpec &tensor) {
    std::vector<std::string> sizes;
    for (const Dimension &size : tensor.shape)
        sizes.push_back(size.is_free() ? size.name : size.size == 0 ? "a fixed size" : std::to_string(size.size));
    return join(tensor.dtype, " (", listed(sizes), ")");
}

// A graph that is held against what its role wants.
class Role {
  public:
    Role(const Bundle &bundle, const std::string &name) : bundle_(bundle), name_(name), graph_(graph_of(bundle, name)) {}

    const GraphSpec &spec() const { return graph_; }

    // The tensor, which must be there and be as it is wanted.
    const TensorSpec &input(const TensorSpec &wanted) { return checked(graph_.inputs, wanted, "input"); }
    const TensorSpec &output(const TensorSpec &wanted) { return checked(graph_.outputs, wanted, "output"); }

    // The same of an input that there need not be; whether there is one.
    bool may_take(const TensorSpec &wanted) {
        if (graph_.input(wanted.name) == nullptr) return false;
        input(wanted);
        return true;
    }

    bool gives(const std::string &name) const {
        return std::any_of(graph_.outputs.begin(), graph_.outputs.end(),
                           [&](const TensorSpec &tensor) { return tensor.name == name; });
    }
    bool does_not_know(const std::string &name) const { return known_.count(name) == 0; }

    // Refuse inputs that were not asked about.
    void takes_nothing_else() const {
        for (const TensorSpec &tensor : graph_.inputs)
            if (known_.count(tensor.name) == 0) refuse(join("it takes '", tensor.name, "', which is not known here"));
    }

    [[noreturn]] void refuse(const std::string &what) const {
        throw BundleError(
            join("Bundle ", bundle_.path().string(), ": manifest.json says of ", name_, " that ", what, ". Export it anew."));
    }

  private:
    const TensorSpec &checked(const std::vector<TensorSpec> &tensors, const TensorSpec &wanted, const char *side) {
        const auto found =
            std::find_if(tensors.begin(), tensors.end(), [&](const TensorSpec &tensor) { return tensor.name == wanted.name; });
        if (found == tensors.end()) refuse(join("it has no ", side, " '", wanted.name, "'"));
        if (!fits(*found, wanted))
            refuse(join("its ", side, " '", wanted.name, "' is ", described(*found), "; ", described(wanted), " is needed"));
        known_.insert(wanted.name);
        return *found;
    }

    bool fits(const TensorSpec &there, const TensorSpec &wanted) {
        if (there.dtype != wanted.dtype || there.shape.size() != wanted.shape.size()) return false;
        for (std::size_t k = 0; k < wanted.shape.size(); ++k)
            if (!fits(there.shape[k], wanted.shape[k])) return false;
        return true;
    }

    bool fits(const Dimension &there, const Dimension &wanted) {
        if (there.is_free() != wanted.is_free()) return false;
        if (!wanted.is_free())
            return wanted.size == 0 ? there.size >= 1 : there.size == wanted.size;
        const auto [mine, is_new] = names_.emplace(wanted.name, there.name);
        return is_new ? taken_.insert(there.name).second : mine->second == there.name;
    }

    const Bundle &bundle_;
    std::string name_;
    const GraphSpec &graph_;
    std::map<std::string, std::string> names_;  // of free sizes, by what the role calls them
    std::set<std::string> taken_, known_;
};

using Kinds = std::map<std::string, std::vector<TensorSpec>>;

// What a request gives to graphs, of which kinds, by name; as REQUEST_SOURCES in ldm_export/contract.py.
const Kinds &request_sources() {
    const Dimension features{0, "features"}, channels{0, "channels"};
    static const Kinds kinds{
        {"height", {{"height", "float32", {}}}},
        {"width", {{"width", "float32", {}}}},
        {"guidance", {{"guidance", "float32", {}}}},
        {"guidance_weight", {{"guidance_weight", "float32", {}}}},
        {"has_prompt", {{"has_prompt", "float32", {BATCH}}}},
        {"is_negative", {{"is_negative", "float32", {BATCH}}}},
        {"class_labels", {{"class_labels", "int64", {BATCH}}, {"class_labels", "float32", {BATCH, features}}}},
        {"image_latents", {{"image_latents", "float32", {BATCH, channels, HEIGHT, WIDTH}}}},
    };
    return kinds;
}

// Whether an input can be given a source. Each row is of a picture, so the first size is free in both; what is free in a
// graph's output is free in the input, and what a request gives has the size that is wanted.
bool can_take(const TensorSpec &tensor, const TensorSpec &given, bool of_request) {
    if (tensor.dtype != given.dtype || tensor.shape.size() != given.shape.size()) return false;
    for (std::size_t k = 0; k < tensor.shape.size(); ++k) {
        const Dimension &wanted = tensor.shape[k], &there = given.shape[k];
        if (k == 0 && !(wanted.is_free() && there.is_free())) return false;
        if (k > 0 && !wanted.is_free() && !(there.is_free() ? of_request : there.size == wanted.size)) return false;
    }
    return true;
}

void check_source(const Role &role, const TensorSpec &tensor, const std::string &source, const Kinds &known) {
    const auto found = known.find(source);
    if (found == known.end()) role.refuse(join("it reads '", source, "', which nothing gives"));
    const bool of_request = request_sources().count(source) != 0;
    for (const TensorSpec &given : found->second)
        if (can_take(tensor, given, of_request)) return;
    role.refuse(join("its input '", tensor.name, "' is ", described(tensor), ", and ", source, " is ", described(found->second.front())));
}

void add_outputs(Kinds &known, const std::string &prefix, const GraphSpec &graph) {
    for (const TensorSpec &tensor : graph.outputs) known[join(prefix, ".", tensor.name)] = {tensor};
}

void check_text_encoders(const Bundle &bundle, const Roles &roles) {
    for (const TextEncoder &encoder : roles.text_encoders) {
        Role role(bundle, encoder.graph);
        if (std::find(std::begin(TOKENIZER_KINDS), std::end(TOKENIZER_KINDS), encoder.kind) == std::end(TOKENIZER_KINDS))
            role.refuse(join("its tokenizer is of the kind '", encoder.kind, "'; ", listed(TOKENIZER_KINDS), " can be read"));
        role.input({"input_ids", "int64", {BATCH, {encoder.length}}});
        role.takes_nothing_else();
    }
}

void check_denoiser(const Bundle &bundle, const Roles &roles, std::int64_t latent_channels) {
    Role denoiser(bundle, roles.denoiser);
    const std::vector<Dimension> latents{BATCH, {latent_channels}, HEIGHT, WIDTH};
    denoiser.input({"sample", "float32", latents});
    denoiser.input({"timestep", "float32", {BATCH}});
    denoiser.output({"out_sample", "float32", latents});
    Kinds known = request_sources();
    for (const TextEncoder &encoder : roles.text_encoders) add_outputs(known, encoder.graph, graph_of(bundle, encoder.graph));
    if (!roles.conditioner.empty()) {
        const Role conditioner(bundle, roles.conditioner);
        for (const TensorSpec &tensor : conditioner.spec().inputs) check_source(conditioner, tensor, tensor.name, known);
        add_outputs(known, "conditioner", conditioner.spec());
    }
    for (const auto &[name, source] : roles.conditions) {
        const TensorSpec *tensor = denoiser.spec().input(name);
        if (tensor == nullptr || !denoiser.does_not_know(name))
            denoiser.refuse(join("'", name, "' is a condition, and there is no such input"));
        check_source(denoiser, *tensor, source, known);
    }
    if (roles.guidance.kind == GuidanceKind::three_rows) {
        const auto reads_picture = [](const auto &condition) { return condition.second == "image_latents"; };
        if (std::none_of(roles.conditions.begin(), roles.conditions.end(), reads_picture))
            denoiser.refuse("its guidance is of three rows, and it reads no image_latents");
        for (const auto &[name, source] : roles.conditions)
            if (source == "image_latents") denoiser.input({name, "float32", latents});
    }
    for (const TensorSpec &tensor : denoiser.spec().inputs)
        if (denoiser.does_not_know(tensor.name) && roles.conditions.count(tensor.name) == 0)
            denoiser.refuse(join("it takes '", tensor.name, "', which nothing gives"));
}

void check_loop(const Bundle &bundle, const std::string &name, const Roles &roles, std::int64_t latent_channels,
                std::int64_t picture_channels) {
    Role loop(bundle, name);
    const std::vector<Dimension> latents{BATCH, {latent_channels}, HEIGHT, WIDTH};
    loop.input({"noise", "float32", latents});
    loop.may_take({"step_noise", "float32", {ANY, latents[0], latents[1], latents[2], latents[3]}});
    loop.may_take({"guidance_scale", "float32", {}});
    loop.may_take({"has_negative_prompt", "float32", {BATCH}});
    for (std::size_t k = 0; k < roles.text_encoders.size(); ++k) {
        const std::vector<Dimension> ids{BATCH, {roles.text_encoders[k].length}};
        loop.may_take({join("negative_input_ids", Roles::suffix(k)), "int64", ids});
        if (!loop.may_take({join("input_ids", Roles::suffix(k)), "int64", ids}))
            loop.refuse("it reads no prompt, as the denoiser does");
    }
    const TensorSpec *labels = labels_of(roles, bundle.manifest.graphs);
    if ((labels != nullptr) != (loop.spec().input("class_labels") != nullptr))
        loop.refuse("it reads other than the denoiser does");
    if (labels != nullptr) {
        TensorSpec wanted{"class_labels", labels->dtype, labels->shape};
        wanted.shape[0] = BATCH;
        loop.input(wanted);
    }
    loop.takes_nothing_else();
    loop.output({"latents", "float32", latents});
    loop.output({"images", "uint8", {BATCH, ROWS, COLUMNS, {picture_channels}}});
}

}  // namespace

const GraphSpec &graph_of(const Bundle &bundle, const std::string &name) {
    const auto found = bundle.manifest.graphs.find(name);
    if (found == bundle.manifest.graphs.end())
        throw BundleError(join("Bundle ", bundle.path().string(), " has no graph ", name,
                               ", so no picture can be generated. Export it anew."));
    return found->second;
}

const Roles &roles_of(const Bundle &bundle) {
    if (!bundle.manifest.roles)
        throw BundleError(join("Bundle ", bundle.path().string(),
                               ": manifest.json has no roles, so nothing can be generated. Export it anew."));
    return *bundle.manifest.roles;
}

void check_roles(const Bundle &bundle, std::int64_t latent_channels) {
    const Roles &roles = roles_of(bundle);
    check_text_encoders(bundle, roles);
    check_denoiser(bundle, roles, latent_channels);
    Role decoder(bundle, roles.vae_decoder), encoder(bundle, roles.vae_encoder);
    const std::int64_t channels = encoder.input({"sample", "float32", {BATCH, ANY, ROWS, COLUMNS}}).shape[1].size;
    if (channels != GREY && channels != COLOUR) encoder.refuse(join("its pictures have ", channels, " channels; 1 or 3 are needed"));
    if (encoder.gives("latent_sample"))
        encoder.output({"latent_sample", "float32", {BATCH, {latent_channels}, HEIGHT, WIDTH}});
    else
        encoder.output({"latent_parameters", "float32", {BATCH, {2 * latent_channels}, HEIGHT, WIDTH}});
    encoder.takes_nothing_else();
    decoder.input({"latent_sample", "float32", {BATCH, {latent_channels}, HEIGHT, WIDTH}});
    decoder.output({"sample", "float32", {BATCH, {channels}, ROWS, COLUMNS}});
    decoder.takes_nothing_else();
    for (const auto &[name, graph] : bundle.manifest.graphs)
        if (is_loop(graph.path)) check_loop(bundle, name, roles, latent_channels, channels);
}

}  // namespace ldm::runtime
