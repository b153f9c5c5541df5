// The facts of a bundle that is drawn with; as check_drawable in ldm_export/runtime/request.py.
#include "facts.hpp"

#include "error.hpp"

#include <cmath>

namespace ldm::runtime {

namespace {

class Reader {
  public:
    explicit Reader(const Bundle &bundle) : bundle_(bundle), model_(bundle.manifest.model) {}

    std::uint32_t count(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::integer) || value.integer() < 1 || value.integer() > LARGEST) refuse(key, value);
        return static_cast<std::uint32_t>(value.integer());
    }

    double positive(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::number) || !(value.number() > 0)) refuse(key, value);
        return value.number();
    }

    std::string text(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::text)) refuse(key, value);
        return value.text();
    }

    double number_or(const char *key, double otherwise) const {
        if (model_.object().count(key) == 0) return otherwise;
        const Json &value = model_[key];
        if (!value.is(Kind::number)) refuse(key, value);
        return value.number();
    }

    bool flag(const char *key) const {
        if (model_.object().count(key) == 0) return false;
        const Json &value = model_[key];
        if (!value.is(Kind::boolean)) refuse(key, value);
        return value.boolean();
    }

    // A tensor of rank 4 whose channels are fixed.
    std::uint32_t channels(const char *graph, const TensorSpec *tensor) const {
        if (tensor == nullptr || tensor->shape.size() != 4 || tensor->shape[1].is_free() || tensor->shape[1].size < 1 ||
            tensor->shape[1].size > LARGEST)
            throw BundleError(join("Bundle ", bundle_.path().string(), ": manifest.json does not say of ", graph,
                                   " what drawing needs. Export it anew."));
        return static_cast<std::uint32_t>(tensor->shape[1].size);
    }

    const GraphSpec &graph(const char *name) const {
        const auto found = bundle_.manifest.graphs.find(name);
        if (found == bundle_.manifest.graphs.end())
            throw BundleError(join("Bundle ", bundle_.path().string(), " has no graph ", name,
                                   ", so nothing can be drawn. Export it anew."));
        return found->second;
    }

  private:
    [[noreturn]] void refuse(const char *key, const Json &value) const {
        throw BundleError(join("Bundle ", bundle_.path().string(), ": manifest.json has model.", key, " = ", value.dump(),
                               ". Export it anew."));
    }

    static constexpr std::int64_t LARGEST = 1 << 20;

    const Bundle &bundle_;
    const Json &model_;
};

}  // namespace

Facts facts_of(const Bundle &bundle) {
    const Reader reader(bundle);
    const GraphSpec &unet = reader.graph("unet"), &encoder = reader.graph("vae_encoder");
    reader.graph("vae_decoder");
    Facts facts{};
    facts.height = reader.count("height");
    facts.width = reader.count("width");
    facts.latent_channels = reader.count("latent_channels");
    facts.pixels_per_latent = reader.count("pixels_per_latent");
    facts.scaling_factor = reader.positive("scaling_factor");
    facts.default_sampler = reader.text("default_sampler");
    facts.default_steps = reader.count("default_steps");
    facts.default_guidance = reader.number_or("default_guidance", 4.0);
    facts.guidance_folded = reader.flag("guidance_folded");
    facts.zeros_for_empty_prompt = reader.flag("zeros_for_empty_prompt");
    facts.unet_channels = reader.channels("unet", unet.input("sample"));
    facts.picture_channels = reader.channels("vae_encoder", encoder.inputs.empty() ? nullptr : &encoder.inputs[0]);
    facts.reads_text = unet.input("encoder_hidden_states") != nullptr;
    facts.takes_classes = unet.input("class_labels") != nullptr;
    facts.takes_scale = unet.input("timestep_cond") != nullptr;
    const Json &classes = bundle.manifest.model["num_class_embeds"];
    const bool told = facts.takes_classes && classes.is(Kind::integer) && classes.integer() > 0;
    facts.class_count = told ? reader.count("num_class_embeds") : 0;
    if (facts.reads_text) reader.graph("text_encoder");
    return facts;
}

}  // namespace ldm::runtime
