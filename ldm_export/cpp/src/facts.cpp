// The facts of a bundle that is drawn with; as check_drawable in ldm_export/runtime/request.py.
#include "facts.hpp"

#include "contract.hpp"
#include "error.hpp"

#include <cmath>

namespace ldm::runtime {

namespace {

constexpr double LARGEST_NUMBER = LARGEST_SIZE, LEAST_SCALE = 1 / LARGEST_NUMBER, DEFAULT_GUIDANCE = 4.0;
constexpr std::size_t LONGEST_NAME = 100;

// Words of small letters and digits with a dash between them.
bool is_sampler(const std::string &name) {
    if (name.empty() || name.size() > LONGEST_NAME || name.front() == '-' || name.back() == '-') return false;
    return name.find("--") == std::string::npos &&
           name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos;
}

class Reader {
  public:
    explicit Reader(const Bundle &bundle) : bundle_(bundle), model_(bundle.manifest.model) {}

    std::uint32_t count(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::integer) || value.integer() < 1 || value.integer() > LARGEST_SIZE) refuse(key, value);
        return static_cast<std::uint32_t>(value.integer());
    }

    // A number from `least` to `most`; without one `otherwise`, unless that is not a number.
    double number(const char *key, double least, double most, double otherwise = std::nan("")) const {
        if (model_.object().count(key) == 0 && !std::isnan(otherwise)) return otherwise;
        const Json &value = model_[key];
        if (!value.is(Kind::number) || !(value.number() >= least && value.number() <= most)) refuse(key, value);
        return value.number();
    }

    // The name of a sampler, such as "dpmpp-2m".
    std::string sampler(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::text) || !is_sampler(value.text())) refuse(key, value);
        return value.text();
    }

    bool flag(const char *key) const {
        if (model_.object().count(key) == 0) return false;
        const Json &value = model_[key];
        if (!value.is(Kind::boolean)) refuse(key, value);
        return value.boolean();
    }

    [[noreturn]] void refuse(const char *key, const Json &value) const {
        throw BundleError(join("Bundle ", bundle_.path().string(), ": manifest.json has model.", key, " = ", value.dump(),
                               ". Export it anew."));
    }

  private:
    const Bundle &bundle_;
    const Json &model_;
};

}  // namespace

Facts facts_of(const Bundle &bundle) {
    const Reader reader(bundle);
    Facts facts{};
    facts.height = reader.count("height");
    facts.width = reader.count("width");
    facts.latent_channels = reader.count("latent_channels");
    facts.pixels_per_latent = reader.count("pixels_per_latent");
    for (const char *side : {"height", "width"})
        if (reader.count(side) % facts.pixels_per_latent != 0) reader.refuse(side, bundle.manifest.model[side]);
    facts.scaling_factor = reader.number("scaling_factor", LEAST_SCALE, LARGEST_NUMBER);
    facts.default_sampler = reader.sampler("default_sampler");
    facts.default_steps = reader.count("default_steps");
    facts.default_guidance = reader.number("default_guidance", 0, LARGEST_NUMBER, DEFAULT_GUIDANCE);
    facts.guidance_folded = reader.flag("guidance_folded");
    facts.zeros_for_empty_prompt = reader.flag("zeros_for_empty_prompt");
    const std::uint32_t classes = bundle.manifest.model["num_class_embeds"].is_null() ? 0 : reader.count("num_class_embeds");
    check_roles(bundle, facts.latent_channels);
    const GraphSpec &unet = graph_of(bundle, "unet");
    facts.unet_channels = static_cast<std::uint32_t>(unet.input("sample")->shape[1].size);
    facts.picture_channels = static_cast<std::uint32_t>(graph_of(bundle, "vae_encoder").input("sample")->shape[1].size);
    facts.reads_text = unet.input("encoder_hidden_states") != nullptr;
    facts.takes_classes = unet.input("class_labels") != nullptr;
    facts.takes_scale = unet.input("timestep_cond") != nullptr;
    facts.class_count = facts.takes_classes ? classes : 0;
    return facts;
}

}  // namespace ldm::runtime
