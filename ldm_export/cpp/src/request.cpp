#include "request.hpp"

#include "compiler.hpp"
#include "error.hpp"
#include "forecast.hpp"
#include "inpainting.hpp"
#include "memory.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

constexpr std::size_t LARGEST_BATCH = 1 << 16;
constexpr std::uint32_t LARGEST_SIDE = 1 << 20;
constexpr std::int64_t LARGEST_GUIDANCE = 1'000'000;
constexpr const char *SCHEDULER = "scheduler/scheduler_config.json";  // what plans are compiled from
constexpr double DECODER_FEATURES = 32, LATENT_BUFFERS = 8;  // held at once, at the least, of a pixel and of a latent

std::vector<std::string> texts(const char *const *given, std::size_t count, const char *what) {
    std::vector<std::string> found;
    for (std::size_t k = 0; k < count; ++k) {
        if (given == nullptr || given[k] == nullptr) throw InputError(join(what, " ", k, " is NULL; give one a picture."));
        found.emplace_back(given[k]);
        if (!is_utf8(found.back())) throw InputError(join(what, " ", k, " is not UTF-8 text. Convert it."));
    }
    return found;
}

// The scale of the guidance towards the picture that is edited; 0 for models that edit none. As
// ldm_export/runtime/editing.py.
double image_guidance(const Facts &facts, const ldm_draw_options &options) {
    const double asked = options.image_guidance;
    if (!facts.edits) {
        if (!std::isnan(asked))
            throw InputError("image_guidance was given, and this model edits no picture, so it would do nothing. Leave it out.");
        return 0;
    }
    if (options.image == nullptr)
        throw InputError("This model edits a picture as the prompt says, and none was given. Give the image.");
    if (options.mask != nullptr || !std::isnan(options.strength))
        throw InputError(join("A ", options.mask != nullptr ? "mask" : "strength", " was given; this model edits the whole "
                              "picture, from noise, as the prompt and its two guidances say. Leave it out."));
    if (std::isnan(asked)) return IMAGE_GUIDANCE;
    if (!(asked >= 0 && asked <= LARGEST_GUIDANCE))
        throw InputError(join("image_guidance is ", short_repr(asked), "; give a number from 0 to 1e+06."));
    return asked;
}

// Throws unless a denoiser that reads a picture's latents beside its own reads a mask before them, and both were given.
void check_reads_mask(const Facts &facts, const ldm_draw_options &options) {
    if (facts.reads_image_latents && !facts.inpaints)
        throw InputError("This bundle's denoiser reads the latents of another picture without a mask, as for editing it, and its "
                         "manifest says no guidance of three rows, by which this runtime edits. Run its graphs yourself.");
    if (facts.inpaints && (options.image == nullptr || options.mask == nullptr))
        throw InputError("This model was trained to inpaint, so it reads a picture and a mask of what is drawn anew in it. Give "
                         "both: image and mask.");
}

void check_kind_of_input(const Facts &facts, bool prompts, bool labels) {
    if (facts.reads_text == prompts && facts.takes_classes == labels) return;
    const std::string classes = facts.class_count == 0
                                    ? "class labels"
                                    : join("class labels from 0 to ", facts.class_count - 1);
    const std::string wants = facts.reads_text && facts.takes_classes ? "a prompt a picture and " + classes
                              : facts.reads_text                      ? "a prompt a picture"
                              : facts.takes_classes                   ? classes
                                                                      : "neither: give their number alone";
    throw InputError(join(prompts ? "Prompts" : "No prompts", " and ", labels ? "class labels" : "no class labels",
                          " were given; this model takes ", wants, "."));
}

std::vector<std::string> negatives(const ldm_draw_options &options, std::size_t count) {
    if (options.negative_prompts == nullptr) return std::vector<std::string>(count);
    const std::size_t given = options.negative_prompt_count;
    if (given != 1 && given != count)
        throw InputError(join(given, " negative prompts were given for ", count, " pictures. Give one, or one each."));
    std::vector<std::string> found = texts(options.negative_prompts, given, "Negative prompt");
    found.resize(count, found[0]);
    return found;
}

// The scale with which predictions are combined, or that the denoiser is given; 1 where it has its own inside.
double guidance(const Facts &facts, double asked, const std::vector<std::string> &negative_prompts) {
    const Guidance &model = facts.guidance;
    const bool asked_is_own = std::isnan(asked);
    const double scale = asked_is_own ? model.scale : asked;
    if (!(asked_is_own || (scale >= 0 && scale <= LARGEST_GUIDANCE)))
        throw InputError(join("guidance is ", scale, "; give a number from 0 to ", LARGEST_GUIDANCE, ", 1 being off."));
    if (model.kind == GuidanceKind::two_rows || model.kind == GuidanceKind::three_rows) return scale;
    const bool negative = std::any_of(negative_prompts.begin(), negative_prompts.end(),
                                      [](const std::string &prompt) { return !prompt.empty(); });
    const char *remedy = "Leave it out, or use the bundle of the model that it was distilled from.";
    if (model.kind == GuidanceKind::input) {
        if (negative)
            throw InputError(join("A negative prompt was given; this model was distilled to be given a guidance scale and "
                                  "takes none. ", remedy));
        return scale;
    }
    if (scale == model.scale && !negative) return 1.0;
    const std::string what = scale != model.scale ? join("Guidance ", scale) : "A negative prompt";
    if (model.scale <= 1)
        throw InputError(what + " was asked for; this model makes one prediction, without guidance. Leave it out.");
    throw InputError(join(what, " was asked for; this model was distilled with guidance ", model.scale,
                          " and takes no other, and no negative prompt. ", remedy));
}

std::vector<std::int64_t> seeds(const ldm_draw_options &options, std::size_t count) {
    if (options.seeds != nullptr) return {options.seeds, options.seeds + count};
    std::vector<std::int64_t> found;
    for (std::size_t k = 0; k < count; ++k)  // the low bits count, so that wrapping around is right
        found.push_back(static_cast<std::int64_t>(static_cast<std::uint64_t>(options.seed) + k));
    return found;
}

Tensor labels(const Bundle &bundle, const Facts &facts, const std::int64_t *given, std::size_t count) {
    const TensorSpec *input = labels_of(*bundle.manifest.roles, bundle.manifest.graphs);
    if (input->dtype != "int64" || input->shape.size() != 1)
        throw InputError("This model takes features as class labels; this runtime gives whole numbers. Use the Python one.");
    Tensor found = Tensor::zeros<std::int64_t>({static_cast<std::int64_t>(count)});
    for (std::size_t k = 0; k < count; ++k) {
        if (facts.class_count != 0 && (given[k] < 0 || given[k] >= facts.class_count))
            throw InputError(join("class label ", given[k], " is none; this model has 0 to ", facts.class_count - 1, "."));
        found.as<std::int64_t>()[k] = given[k];
    }
    return found;
}

// Pictures uint8 (N, H, W, C) as (B, C, H, W) in [-1, 1]; one serves the whole batch.
Tensor image(const ldm_draw_options &options, std::size_t count, std::size_t height, std::size_t width,
             std::size_t channels) {
    if (options.image_count != 1 && options.image_count != count)
        throw InputError(join(options.image_count, " images were given for ", count, " pictures. Give one, or one each."));
    Tensor sample = Tensor::zeros<float>({static_cast<std::int64_t>(count), static_cast<std::int64_t>(channels),
                                          static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)});
    const std::size_t plane = height * width;
    float *out = sample.as<float>();
    for (std::size_t k = 0; k < count; ++k) {
        const std::uint8_t *pixels = options.image + (options.image_count == 1 ? 0 : k * plane * channels);
        for (std::size_t c = 0; c < channels; ++c)
            for (std::size_t i = 0; i < plane; ++i)
                *out++ = static_cast<float>(pixels[i * channels + c]) / 127.5f - 1.0f;
    }
    return sample;
}

// The mask of a request, and its run and levels from the picture that it starts from.
void from_image(Request &request, const Plan &plan, const Facts &facts, const ldm_draw_options &options) {
    if (options.mask != nullptr)
        request.mask = checked_mask(options.mask, options.mask_count, request.batch(), request.height, request.width,
                                    facts.pixels_per_latent, facts.inpaints);
    const double strength = !std::isnan(options.strength) ? options.strength : request.mask ? 1.0 : 0.6;
    const std::size_t start = plan.first_step(strength, facts.strength_rounds_up);
    if (!request.mask || strength < 1) request.trajectory = plan.starting_at(start);
    if (request.mask && !facts.inpaints) request.levels = row_levels(plan, start);
}

void check_size(std::uint32_t height, std::uint32_t width, std::uint32_t multiple) {
    const auto fits = [&](std::uint32_t side) { return side >= multiple && side <= LARGEST_SIDE && side % multiple == 0; };
    if (fits(height) && fits(width)) return;
    const auto nearest = [&](std::uint64_t side) {
        const std::uint64_t largest = LARGEST_SIDE / multiple;
        return std::clamp((side + multiple / 2) / multiple, std::uint64_t{1}, largest) * multiple;
    };
    throw InputError(join("The size ", height, "x", width, " does not fit; height and width must be multiples of ", multiple,
                          ". Use ", nearest(height), "x", nearest(width), "."));
}

// Refuse what certainly takes more memory than there is, before any of it is asked for.
void check_memory(const Facts &facts, const Request &request) {
    const double pixels = static_cast<double>(request.batch()) * request.height * request.width;
    const double latents = pixels / facts.pixels_per_latent / facts.pixels_per_latent * facts.latent_channels;
    const double pixel_bytes = 4 * DECODER_FEATURES + 5.0 * facts.picture_channels;  // float32 and uint8
    const double needed = pixels * pixel_bytes + 4 * LATENT_BUFFERS * latents, left = static_cast<double>(available_bytes());
    if (needed > left)
        throw InputError(join(request.batch(), " pictures of ", request.height, "x", request.width, " take at least ",
                              std::ceil(needed / 1e6) / 1e3, " GB of memory; ", std::floor(left / 1e6) / 1e3,
                              " GB are left. Ask for fewer or smaller ones."));
}

// The scheduler config, in which diffusers may have written Infinity.
Json scheduler_of(const Bundle &bundle) {
    try {
        Json config = parsed(bundle.files.text(SCHEDULER), Repeats::refused, Constants::allowed);
        if (!config.is(Kind::object)) throw MalformedError("no JSON object");
        return config;
    } catch (const MalformedError &error) {
        throw BundleError(join("Bundle ", bundle.path().string(), ": ", SCHEDULER, " is ", error.what(),
                               ". Export the bundle anew."));
    }
}

// The plan in the bundle's file of that name, where it has one.
std::optional<Plan> plan_in(const Bundle &bundle, const std::string &sampler, std::uint32_t steps) {
    const std::string path = join("plans/", sampler, "-", steps, ".json");
    if (!bundle.files.has(path)) return std::nullopt;
    Plan plan = plan_from_json(bundle.files.text(path));
    if (plan.sampler != sampler || plan.num_inference_steps != steps)
        throw InputError(join(path, " of ", bundle.path().string(), " is a plan of ", plan.num_inference_steps, " steps of '",
                              plan.sampler, "'. Compile the plan again."));
    return plan;
}

// The plan of that sampler and number of steps: the bundle's file, unless it is of pictures of another number of tokens, or
// else compiled by its scheduler config.
Plan read_plan(const Bundle &bundle, const std::string &sampler, std::uint32_t steps, std::int64_t tokens) {
    std::optional<Plan> plan = plan_in(bundle, sampler, steps);
    if (plan && (plan->tokens == 0 || plan->tokens == tokens)) return *std::move(plan);
    std::vector<std::string> there, kin;
    for (const auto &[name, _] : bundle.manifest.files) {
        if (name.rfind("plans/", 0) != 0) continue;
        there.push_back(name.substr(6, name.size() - std::min<std::size_t>(name.size(), 6 + 5)));  // without .json
        if (there.back().substr(0, there.back().rfind('-')) == sampler) kin.push_back(there.back());
    }
    const std::string lacks = join("This bundle has no plan for ", short_repr(sampler), " with ", steps, " steps",
                                   plan ? join(" and pictures of ", tokens, " tokens") : "");
    std::sort(there.begin(), there.end());
    if (!bundle.files.has(SCHEDULER))
        throw InputError(join(lacks, ", and no ", SCHEDULER, " to compile one from; its plans: ", listed(there, "none"),
                              ". Use one of those, or export the bundle anew."));
    const Json config = scheduler_of(bundle);
    try {
        return compile_plan(config, sampler, steps, tokens);
    } catch (const InputError &error) {
        std::sort(kin.begin(), kin.end(), [](const std::string &a, const std::string &b) {
            return std::pair(a.size(), a) < std::pair(b.size(), b);
        });
        const std::string has = kin.empty() ? "" : " (it has " + listed(kin) + ")";
        throw InputError(join(lacks, has, ", and it cannot be compiled: ", error.what()));
    }
}

// Throws InputError if pictures of this size have another plan than the one that a loop is made of.
void check_loop_size(const Bundle &bundle, const Facts &facts, const std::string &sampler, std::uint32_t steps,
                     const Request &request) {
    const std::int64_t own = facts.tokens(facts.height, facts.width);
    const std::optional<Plan> plan = plan_in(bundle, sampler, steps);
    const std::int64_t made_for = plan ? plan->tokens : read_plan(bundle, sampler, steps, own).tokens;
    if (made_for == 0 || made_for == facts.tokens(request.height, request.width)) return;
    const std::string what = made_for == own ? join(facts.height, "x", facts.width) : join("pictures of ", made_for, " tokens");
    throw InputError(join("The whole loop ", sampler, "-", steps, " was asked for at ", request.height, "x", request.width,
                          "; it is made for ", what, ", since this model's noise levels are by the size of the picture. Use "
                          "that size, or draw step by step."));
}

std::string loop(const Bundle &bundle, const std::string &sampler, std::uint32_t steps) {
    const std::string name = join("loops/", sampler, "-", steps);
    if (bundle.manifest.graphs.count(name) != 0) return name;
    std::vector<std::string> there;
    for (const auto &[graph, _] : bundle.manifest.graphs)
        if (is_loop(graph)) there.push_back(graph.substr(graph.find('/') + 1));
    throw InputError(join("This bundle has no loop ", sampler, "-", steps, "; it has ", listed(there, "none"),
                          ". Run: ldm-export plan ", bundle.path().string(), " --sampler ", sampler, " --steps ", steps,
                          " --loop"));
}

}  // namespace

Request checked_request(const Bundle &bundle, const Facts &facts, const char *const *prompts, std::size_t count,
                        const ldm_draw_options &options) {
    if (options.deepcache < 1) throw InputError("deepcache is 0; give a whole number from 1 (off) on, such as 3.");
    if (count < 1 || count > LARGEST_BATCH)
        throw InputError(join(count, " pictures were asked for; ask for 1 to ", LARGEST_BATCH, "."));
    Request request{};
    request.image_guidance = image_guidance(facts, options);
    check_reads_mask(facts, options);
    check_kind_of_input(facts, prompts != nullptr, options.class_labels != nullptr);
    if (facts.reads_text) {
        request.prompts = texts(prompts, count, "Prompt");
        request.negative_prompts = negatives(options, count);
    }
    request.no_negative_prompt = !facts.reads_text || options.negative_prompts == nullptr;
    if (facts.takes_classes) request.class_labels = labels(bundle, facts, options.class_labels, count);
    request.guidance = guidance(facts, options.guidance, request.negative_prompts);
    request.reading = {options.prompt_weights != 0, options.long_prompts != 0};
    check_reading(request.reading, *bundle.manifest.roles, bundle.manifest.graphs, options.whole != 0);
    if (request.reading.weights)
        for (const auto *given : {&request.prompts, &request.negative_prompts})
            for (const std::string &prompt : *given) weighted_parts(prompt);
    std::string sampler = options.sampler == nullptr ? facts.default_sampler : options.sampler;
    if (!is_utf8(sampler)) throw InputError("The sampler's name is not UTF-8 text. Use one of the bundle's.");
    const std::uint32_t steps = options.steps == 0 ? facts.default_steps : options.steps;
    if (options.calls > LARGEST_SIDE)
        throw InputError(join("calls is ", options.calls, "; give a whole number from 1 to ", LARGEST_SIDE, "."));
    if (options.calls != 0) sampler += join(CALLS, options.calls);
    if (options.image == nullptr && options.mask != nullptr)
        throw InputError("A mask was given without an image, of which it says what is drawn anew. Give the image, too.");
    if (options.keep_pixels != 0 && options.mask == nullptr)
        throw InputError("keep_pixels was given without a mask, which says what is kept. Leave it out, or give a mask.");
    if (options.whole != 0 && (options.image != nullptr || options.deepcache > 1))
        throw InputError("The whole loop was asked for at once, with an image or with deepcache; a loop graph draws from "
                         "noise, and all of the denoiser each time. Leave one of them out.");
    request.height = options.height == 0 ? facts.height : options.height;
    request.width = options.width == 0 ? facts.width : options.width;
    check_size(request.height, request.width, facts.size_step);
    if (const std::uint32_t largest = facts.largest_size; request.height > largest || request.width > largest)
        throw InputError(join("The size ", request.height, "x", request.width, " does not fit; this model makes pictures of at "
                              "most ", largest, " pixels a side. Use ", std::min(request.height, largest), "x",
                              std::min(request.width, largest), "."));
    const Plan plan = read_plan(bundle, sampler, steps, facts.tokens(request.height, request.width));
    if (options.whole != 0) {  // of the plan's own name, since one of all calls is that of its sampler
        check_loop_size(bundle, facts, plan.sampler, steps, request);
        request.loop = loop(bundle, plan.sampler, steps);
    }
    request.seeds = seeds(options, count);
    check_memory(facts, request);
    request.trajectory = plan.from_noise();
    if (options.image != nullptr) {
        request.image = image(options, count, request.height, request.width, facts.picture_channels);
        if (!facts.edits) from_image(request, plan, facts, options);
    }
    request.mixtures = mixtures_for(bundle, options, count);
    request.keep_pixels = options.keep_pixels != 0;
    request.deepcache = options.deepcache;
    return request;
}

}  // namespace ldm::runtime
