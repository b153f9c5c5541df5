// The facts of a bundle that is drawn with; as check_drawable in ldm_export/runtime/request.py.
#include "facts.hpp"

#include "contract.hpp"
#include "error.hpp"

#include <set>

namespace ldm::runtime {

namespace {

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

    // The name of a sampler, such as "dpmpp-2m".
    std::string sampler(const char *key) const {
        const Json &value = model_[key];
        if (!value.is(Kind::text) || !is_sampler(value.text())) refuse(key, value);
        return value.text();
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
    const Roles &roles = roles_of(bundle);
    const Reader reader(bundle);
    Facts facts{};
    facts.height = reader.count("height");
    facts.width = reader.count("width");
    facts.latent_channels = reader.count("latent_channels");
    facts.pixels_per_latent = reader.count("pixels_per_latent");
    const Json &rounds_up = bundle.manifest.model["strength_rounds_up"];
    if (bundle.manifest.model.object().count("strength_rounds_up") != 0 && !rounds_up.is(Kind::boolean))
        reader.refuse("strength_rounds_up", rounds_up);
    facts.strength_rounds_up = rounds_up.is(Kind::boolean) && rounds_up.boolean();
    const bool bounded = bundle.manifest.model.object().count("largest_size") != 0;
    facts.largest_size = bounded ? reader.count("largest_size") : static_cast<std::uint32_t>(LARGEST_SIZE);
    const bool in_patches = bundle.manifest.model.object().count("patch_size") != 0;
    const std::uint64_t step = std::uint64_t{facts.pixels_per_latent} * (in_patches ? reader.count("patch_size") : 1);
    if (step > LARGEST_SIZE) reader.refuse("patch_size", bundle.manifest.model["patch_size"]);
    facts.size_step = static_cast<std::uint32_t>(step);
    for (const char *side : {"height", "width"})
        if (reader.count(side) % facts.pixels_per_latent != 0) reader.refuse(side, bundle.manifest.model[side]);
    facts.default_sampler = reader.sampler("default_sampler");
    facts.default_steps = reader.count("default_steps");
    const std::uint32_t classes = bundle.manifest.model["class_count"].is_null() ? 0 : reader.count("class_count");
    check_roles(bundle, facts.latent_channels);
    facts.guidance = roles.guidance;
    facts.picture_channels = static_cast<std::uint32_t>(graph_of(bundle, roles.vae_encoder).input("sample")->shape[1].size);
    const std::set<std::string> sources = roles.sources(bundle.manifest.graphs);
    facts.reads_text = !roles.text_encoders.empty();
    facts.takes_classes = sources.count("class_labels") != 0;
    facts.edits = roles.guidance.kind == GuidanceKind::three_rows;
    facts.reads_image_latents = sources.count("image_latents") != 0 && !facts.edits;
    std::vector<std::int64_t> beside;
    for (const auto &[name, source] : roles.conditions)
        if (source == "image_latents") beside.push_back(graph_of(bundle, roles.denoiser).input(name)->shape[1].size);
    facts.inpaints = facts.reads_image_latents && beside == std::vector<std::int64_t>{facts.latent_channels + 1};
    facts.class_count = facts.takes_classes ? classes : 0;
    return facts;
}

}  // namespace ldm::runtime
