#include "contract.hpp"

#include "error.hpp"

#include <algorithm>
#include <map>
#include <set>

namespace ldm::runtime {

namespace {

constexpr std::int64_t GREY = 1, COLOUR = 3;  // channels of pictures
constexpr std::int64_t LEAST_TOKENS = 2;         // start and end
constexpr std::int64_t LEAST_GUIDANCE_SIZE = 4;  // of timestep_cond, whose frequencies are spread over half of it

const Dimension BATCH{0, "batch"}, HEIGHT{0, "height"}, WIDTH{0, "width"}, ROWS{0, "image_height"}, COLUMNS{0, "image_width"};
const Dimension ANY{0, ""};  // a fixed size of whatever value

std::string told(const TensorSpec &tensor) {
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
            refuse(join("its ", side, " '", wanted.name, "' is ", told(*found), "; ", told(wanted), " is needed"));
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

// The text encoders' widths together, of the outputs that the UNet reads, and that of the pooled text, 0 if there is none.
struct TextWidths {
    std::int64_t states = 0, pooled = 0;
};

// The width of the hidden states of every layer, of which there are at least two.
std::int64_t width_of_states(Role &encoder, std::int64_t tokens) {
    std::int64_t width = 0;
    std::size_t layers = 0;
    for (std::string name; layers < 2 || encoder.gives(name); name = join("hidden_states.", ++layers))
        width = encoder.output({join("hidden_states.", layers), "float32", {BATCH, {tokens}, {width}}}).shape[2].size;
    for (const TensorSpec &tensor : encoder.spec().outputs)
        if (tensor.name.rfind("hidden_states.", 0) == 0 && encoder.does_not_know(tensor.name))
            encoder.refuse(join("it gives ", tensor.name, " beside ", layers, " layers' states"));
    return width;
}

TextWidths check_text_encoders(const Bundle &bundle, std::int64_t tokens) {
    std::vector<Role> encoders;
    for (const char *name : {"text_encoder", "text_encoder_2"})
        if (encoders.empty() || bundle.manifest.graphs.count(name) != 0) encoders.emplace_back(bundle, name);
    TextWidths widths;
    if (encoders.back().gives("text_embeds"))
        widths.pooled = encoders.back().output({"text_embeds", "float32", {BATCH, ANY}}).shape[1].size;
    else if (encoders.size() > 1)
        encoders.back().refuse("it gives no text_embeds");
    for (Role &encoder : encoders) {
        encoder.input({"input_ids", "int64", {BATCH, {tokens}}});
        encoder.takes_nothing_else();
        widths.states += widths.pooled == 0 ? encoder.output({"last_hidden_state", "float32", {BATCH, {tokens}, ANY}}).shape[2].size
                                            : width_of_states(encoder, tokens);
    }
    return widths;
}

// Class labels, or their features.
bool may_take_labels(Role &role) {
    const TensorSpec *labels = role.spec().input("class_labels");
    return role.may_take(labels != nullptr && labels->shape.size() == 2 ? TensorSpec{"class_labels", "float32", {BATCH, ANY}}
                                                                        : TensorSpec{"class_labels", "int64", {BATCH}});
}

void check_unet(const Bundle &bundle, std::int64_t latent_channels) {
    Role unet(bundle, "unet");
    unet.input({"sample", "float32", {BATCH, ANY, HEIGHT, WIDTH}});  // more than the latents' for an inpainting model
    unet.input({"timestep", "float32", {}});
    unet.output({"out_sample", "float32", {BATCH, {latent_channels}, HEIGHT, WIDTH}});
    if (const TensorSpec *states = unet.spec().input("encoder_hidden_states")) {
        const std::int64_t tokens = token_count(bundle, "text_encoder");
        const TextWidths widths = check_text_encoders(bundle, tokens);
        const bool fixed = states->shape.size() == 3 && !states->shape[1].is_free();
        unet.input({states->name, "float32", {BATCH, fixed ? Dimension{tokens} : Dimension{0, "tokens"}, {widths.states}}});
        if (widths.pooled != 0) {
            unet.input({"text_embeds", "float32", {BATCH, {widths.pooled}}});
            unet.input({"time_ids", "float32", {BATCH, {6}}});
        }
    }
    may_take_labels(unet);
    if (unet.may_take({"timestep_cond", "float32", {BATCH, ANY}}) &&
        unet.spec().input("timestep_cond")->shape[1].size < LEAST_GUIDANCE_SIZE)
        unet.refuse(join("its timestep_cond is smaller than ", LEAST_GUIDANCE_SIZE));
    unet.takes_nothing_else();
}

void check_loop(const Bundle &bundle, const std::string &name, std::int64_t latent_channels, std::int64_t picture_channels) {
    Role loop(bundle, name);
    const std::vector<Dimension> latents{BATCH, {latent_channels}, HEIGHT, WIDTH};
    loop.input({"noise", "float32", latents});
    loop.may_take({"step_noise", "float32", {ANY, latents[0], latents[1], latents[2], latents[3]}});
    loop.may_take({"guidance_scale", "float32", {}});
    for (const char *ids : {"input_ids", "negative_input_ids"})
        if (loop.spec().input(ids) != nullptr) loop.input({ids, "int64", {BATCH, {token_count(bundle, "text_encoder")}}});
    const GraphSpec &unet = graph_of(bundle, "unet");
    const bool reads_text = unet.input("encoder_hidden_states") != nullptr, takes_labels = unet.input("class_labels") != nullptr;
    if ((loop.spec().input("input_ids") != nullptr) != reads_text || may_take_labels(loop) != takes_labels)
        loop.refuse("it reads other than the UNet does");
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

std::int64_t token_count(const Bundle &bundle, const std::string &encoder) {
    Role role(bundle, encoder);
    const std::int64_t tokens = role.input({"input_ids", "int64", {BATCH, ANY}}).shape[1].size;
    if (tokens < LEAST_TOKENS) role.refuse(join("it reads ", tokens, " tokens"));
    return tokens;
}

std::string states_for_sdxl(const GraphSpec &encoder) {
    const auto layers = std::count_if(encoder.outputs.begin(), encoder.outputs.end(), [](const TensorSpec &tensor) {
        return tensor.name.rfind("hidden_states.", 0) == 0;
    });
    return join("hidden_states.", layers - 2);
}

void check_roles(const Bundle &bundle, std::int64_t latent_channels) {
    check_unet(bundle, latent_channels);
    Role decoder(bundle, "vae_decoder"), encoder(bundle, "vae_encoder");
    const std::int64_t channels = encoder.input({"sample", "float32", {BATCH, ANY, ROWS, COLUMNS}}).shape[1].size;
    if (channels != GREY && channels != COLOUR) encoder.refuse(join("its pictures have ", channels, " channels; 1 or 3 are needed"));
    encoder.output({"latent_parameters", "float32", {BATCH, {2 * latent_channels}, HEIGHT, WIDTH}});
    encoder.takes_nothing_else();
    decoder.input({"latent_sample", "float32", {BATCH, {latent_channels}, HEIGHT, WIDTH}});
    decoder.output({"sample", "float32", {BATCH, {channels}, ROWS, COLUMNS}});
    decoder.takes_nothing_else();
    for (const auto &[name, graph] : bundle.manifest.graphs)
        if (is_loop(graph.path)) check_loop(bundle, name, latent_channels, channels);
}

}  // namespace ldm::runtime
