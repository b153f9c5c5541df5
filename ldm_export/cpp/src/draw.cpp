#include "draw.hpp"

#include "error.hpp"
#include "inpainting.hpp"
#include "start.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

Shape latents_shape(const Model &model, const Request &request) {
    const Facts &facts = model.facts();
    return {static_cast<std::int64_t>(request.batch()), facts.latent_channels, request.height / facts.pixels_per_latent,
            request.width / facts.pixels_per_latent};
}

bool all_finite(const Tensor &tensor) {
    const float *values = tensor.as<float>();
    return std::all_of(values, values + tensor.count(), [](float value) { return std::isfinite(value); });
}

void check_latents(const Tensor &latents, const Request &request, std::size_t step, std::size_t count) {
    if (!all_finite(latents))
        throw BackendError(join("The latents are no numbers after step ", step, " of ", count, " (NaN or infinity), with guidance ",
                                request.guidance, ". Use a smaller guidance or another sampler, or export the bundle anew."));
}

// Pictures (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C).
Tensor pixels_of(const Tensor &sample) {
    const std::int64_t batch = sample.shape[0], channels = sample.shape[1], plane = sample.shape[2] * sample.shape[3];
    Tensor images = Tensor::zeros<std::uint8_t>({batch, sample.shape[2], sample.shape[3], channels});
    const float *in = sample.as<float>();
    for (std::int64_t k = 0; k < batch; ++k)
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t i = 0; i < plane; ++i) {
                const float level = std::max(0.0f, std::min(*in++ / 2 + 0.5f, 1.0f));
                images.as<std::uint8_t>()[(k * plane + i) * channels + c] =
                    static_cast<std::uint8_t>(std::nearbyint(level * 255));
            }
    return images;
}

Tensor decode(Model &model, const Tensor &latents) {
    model.check_unchanged();
    const Facts &facts = model.facts();
    Tensor given = latents;  // which a graph takes as its own to write to
    const Graph &decoder = model.graph(model.roles().vae_decoder);
    const std::int64_t batch = latents.shape[0], channels = facts.picture_channels;
    const std::int64_t height = latents.shape[2] * facts.pixels_per_latent, width = latents.shape[3] * facts.pixels_per_latent;
    const Tensor sample = expected(decoder.run({{"latent_sample", &given}}), decoder.spec(), "sample", "float32",
                                   {batch, channels, height, width});
    if (!all_finite(sample))
        throw BackendError(join("The pictures are no numbers (NaN or infinity comes out of ", decoder.spec().path,
                                "). Use a smaller guidance, or export the bundle anew."));
    return pixels_of(sample);
}

// Pictures of latents, with those pixels of a request's image that it keeps.
Tensor decode(Model &model, const Tensor &latents, const Request &request) {
    Tensor images = decode(model, latents);
    if (request.keep_pixels && request.mask) blend(images, pixels_of(*request.image), *request.mask);
    return images;
}

// Rows as one array (B, ...).
Tensor stacked(const std::vector<const Tensor *> &rows) {
    Tensor whole{rows[0]->dtype, rows[0]->shape, {}};
    whole.shape.insert(whole.shape.begin(), static_cast<std::int64_t>(rows.size()));
    for (const Tensor *row : rows) {
        if (row->shape != rows[0]->shape || row->dtype != rows[0]->dtype)
            throw BundleError("The text encoder gives another size from prompt to prompt. Export the bundle anew.");
        whole.data.insert(whole.data.end(), row->data.begin(), row->data.end());
    }
    return whole;
}

Tensor scalar(double value) {
    Tensor made = Tensor::zeros<float>({});
    *made.as<float>() = static_cast<float>(value);
    return made;
}

// A value for each row: of the negative prompts, where there are such rows, and of the prompts.
Tensor by_row(std::size_t batch, std::size_t each, float negative, float prompt) {
    Tensor made = Tensor::zeros<float>({static_cast<std::int64_t>(batch * each)});
    std::fill_n(std::fill_n(made.as<float>(), batch * (each - 1), negative), batch, prompt);
    return made;
}

Tensor repeated(const Tensor &rows, std::size_t times) {
    Tensor made{rows.dtype, rows.shape, {}};
    made.shape[0] *= static_cast<std::int64_t>(times);
    for (std::size_t k = 0; k < times; ++k) made.data.insert(made.data.end(), rows.data.begin(), rows.data.end());
    return made;
}

// What a request gives to graphs, by name; as request_sources in ldm_export/runtime/conditioning.py.
Tensors request_sources(const Request &request, std::size_t each, const std::optional<Tensor> &image_latents) {
    Tensors made;
    made["height"] = scalar(request.height);
    made["width"] = scalar(request.width);
    made["guidance"] = scalar(request.guidance);
    made["guidance_weight"] = scalar(request.guidance - 1.0);
    made["has_prompt"] = by_row(request.batch(), each, request.no_negative_prompt ? 0.0f : 1.0f, 1.0f);
    made["is_negative"] = by_row(request.batch(), each, 1.0f, 0.0f);
    if (request.class_labels) made["class_labels"] = repeated(*request.class_labels, each);
    if (image_latents) {
        Tensor &rows = made["image_latents"] = repeated(*image_latents, each);
        if (each > 2) std::fill_n(rows.as<float>(), image_latents->count(), 0.0f);
    }
    return made;
}

TensorRefs taken(const GraphSpec &graph, Tensors &there);

using Chunks = std::vector<std::vector<TokenRow>>;  // of one prompt, rows by encoder

// The denoiser's inputs by one chunk of each prompt, of the empty text where a prompt has no such chunk.
Tensors conditions_of_chunk(Model &model, Tensors known, const std::vector<Chunks> &prompts,
                            const std::vector<Chunks> &negatives, std::size_t number, const std::vector<Mixture> &mixtures,
                            std::size_t each) {
    const Roles &roles = model.roles();
    if (!prompts.empty()) {
        const auto encode = [&](const std::vector<Chunks> &read) {
            Chunks chunks;
            for (const Chunks &own : read) chunks.push_back(number < own.size() ? own[number] : model.read("", {})[0]);
            return chunks.empty() ? std::vector<SharedTensors>() : model.encode(chunks, mixtures);
        };
        std::vector<SharedTensors> encoded = encode(prompts);
        const std::vector<SharedTensors> negative = encode(negatives);
        for (std::size_t k = 1; k < each; ++k) encoded.insert(encoded.begin(), negative.begin(), negative.end());
        for (const auto &[source, _] : *encoded[0]) {
            std::vector<const Tensor *> all;
            for (const SharedTensors &row : encoded) all.push_back(&row->at(source));
            known[source] = stacked(all);
        }
    }
    if (!roles.conditioner.empty()) {
        const Graph &conditioner = model.graph(roles.conditioner);
        for (auto &[name, tensor] : conditioner.run(taken(conditioner.spec(), known))) known["conditioner." + name] = tensor;
    }
    Tensors inputs;
    for (const auto &[name, source] : roles.conditions) {
        const auto found = known.find(source);
        if (found == known.end())
            throw BundleError(join("The denoiser reads '", source, "', which nothing gives here. Export the bundle anew."));
        inputs[name] = found->second;
    }
    return inputs;
}

// Arrays (B, tokens, ...) one after another along their tokens.
Tensor joined(const std::vector<const Tensor *> &arrays) {
    Tensor whole{arrays[0]->dtype, arrays[0]->shape, {}};
    const auto batch = static_cast<std::size_t>(whole.shape[0]);
    whole.shape[1] *= static_cast<std::int64_t>(arrays.size());
    for (std::size_t k = 0; k < batch; ++k)
        for (const Tensor *array : arrays) {
            const auto each = static_cast<std::ptrdiff_t>(array->data.size() / batch);
            const auto from = array->data.begin() + static_cast<std::ptrdiff_t>(k) * each;
            whole.data.insert(whole.data.end(), from, from + each);
        }
    return whole;
}

// The denoiser's inputs beside latents and timestep, with `each` rows a picture; with guidance the negative prompts' come
// first, of three those without the picture's latents before those with them.
Tensors conditions(Model &model, const Request &request, std::size_t each, const std::optional<Tensor> &image_latents) {
    const Tensors known = request_sources(request, each, image_latents);
    std::vector<Chunks> prompts, negatives;
    std::size_t count = 1;
    for (auto [given, read] : {std::pair(&request.prompts, &prompts), std::pair(&request.negative_prompts, &negatives)}) {
        if (read == &negatives && each == 1) continue;
        for (const std::string &prompt : *given) read->push_back(model.read(prompt, request.reading));
        for (const Chunks &chunks : *read) count = std::max(count, chunks.size());
    }
    std::vector<Tensors> made;
    for (std::size_t k = 0; k < count; ++k) made.push_back(conditions_of_chunk(model, known, prompts, negatives, k, request.mixtures, each));
    Tensors inputs = made[0];
    if (count == 1) return inputs;
    for (const std::string &name : joined_conditions(model.roles(), model.bundle().manifest.graphs)) {
        std::vector<const Tensor *> arrays;
        for (const Tensors &chunk : made) arrays.push_back(&chunk.at(name));
        inputs[name] = joined(arrays);
    }
    return inputs;
}

// Throws InputError if prompts of several chunks have more tokens than the opened denoiser takes.
void check_tokens(const Model &model, const Graph &denoiser, const Tensors &inputs) {
    for (const std::string &name : joined_conditions(model.roles(), model.bundle().manifest.graphs)) {
        const Shape &shape = inputs.at(name).shape;
        try {
            denoiser.check_shape(name, shape);
        } catch (const InputError &) {
            throw InputError(join("The prompts in chunks have ", shape[1], " tokens; ", model.backend(),
                                  " was built for another number. Use the backend cpu, or leave long_prompts out."));
        }
    }
}

// Of what there is, what a graph takes; it must be all.
TensorRefs taken(const GraphSpec &graph, Tensors &there) {
    TensorRefs refs;
    for (const TensorSpec &input : graph.inputs) {
        const auto found = there.find(input.name);
        if (found == there.end())
            throw BundleError(join(graph.path, " takes '", input.name, "', which this runtime does not know. Update it."));
        refs.emplace(input.name, &found->second);
    }
    return refs;
}

// Token ids (B, L).
Tensor ids_of(const Tokenizer &tokenizer, const std::vector<std::string> &prompts, const Warn &warn) {
    const auto length = static_cast<std::int64_t>(tokenizer.max_length());
    Tensor ids = Tensor::zeros<TokenId>({static_cast<std::int64_t>(prompts.size()), length});
    for (std::size_t k = 0; k < prompts.size(); ++k) {
        const std::vector<TokenId> row = tokenizer(prompts[k], warn);
        std::copy(row.begin(), row.end(), ids.as<TokenId>() + static_cast<std::int64_t>(k) * length);
    }
    return ids;
}

// Combine the predictions of each picture's rows, `count` values each, in the last one:
//   two     negative + guidance * (prompt - negative)
//   three   nothing + guidance * (prompt - picture) + image_guidance * (picture - nothing)       (2211.09800, eq. 3)
void combine(const Request &request, float *out, std::size_t count, std::size_t each) {
    const auto guidance = static_cast<float>(request.guidance), image_guidance = static_cast<float>(request.image_guidance);
    float *prediction = out + (each - 1) * count;
    const float *before = prediction - (each > 1 ? count : 0);
    if (each == 2)
        for (std::size_t i = 0; i < count; ++i) prediction[i] = (prediction[i] - before[i]) * guidance + before[i];
    if (each == 3)
        for (std::size_t i = 0; i < count; ++i)
            prediction[i] = out[i] + (prediction[i] - before[i]) * guidance + (before[i] - out[i]) * image_guidance;
}

// All of a drawing by a loop graph, in one call.
Tensor draw_whole(Model &model, const Request &request, const OnStep &on_step) {
    const Graph &loop = model.graph(request.loop);
    const Shape shape = latents_shape(model, request);
    Noise noise(request.seeds, shape);
    Tensors given;
    Tensor &start = given["noise"] = Tensor::zeros<float>(shape);
    std::copy_n(noise.draw(), start.count(), start.as<float>());
    if (const TensorSpec *wanted = loop.spec().input("step_noise"); wanted != nullptr) {
        const auto &rows = request.trajectory.rows;
        const auto draws = std::count_if(rows.begin(), rows.end(), [](const Row &row) { return row.noise != 0; });
        if (wanted->shape[0].size != draws)
            throw BundleError(join(loop.spec().path, " takes noise for ", wanted->shape[0].size, " steps, and its plan adds it in ",
                                   draws, ". Make the loop anew."));
        Shape all = shape;
        all.insert(all.begin(), draws);
        Tensor &values = given["step_noise"] = Tensor::zeros<float>(all);
        for (std::int64_t k = 0; k < all[0]; ++k)
            std::copy_n(noise.draw(), start.count(), values.as<float>() + k * static_cast<std::int64_t>(start.count()));
    }
    *(given["guidance_scale"] = Tensor::zeros<float>({})).as<float>() = static_cast<float>(request.guidance);
    if (request.class_labels) given["class_labels"] = *request.class_labels;
    given["has_negative_prompt"] = by_row(request.batch(), 1, 0.0f, request.no_negative_prompt ? 0.0f : 1.0f);
    const Tokenizers &tokenizers = model.tokenizers();
    for (std::size_t i = 0; i < tokenizers.size(); ++i)
        for (const auto &[name, prompts] : {std::make_pair("input_ids", &request.prompts),
                                            std::make_pair("negative_input_ids", &request.negative_prompts)})
            given[name + Roles::suffix(i)] = ids_of(*tokenizers[i], *prompts, [&](const std::string &what) { model.warn(what); });
    model.check_unchanged();
    const Tensors results = loop.run(taken(loop.spec(), given));
    const Tensor latents = expected(results, loop.spec(), "latents", "float32", shape);
    check_latents(latents, request, request.trajectory.rows.size(), request.trajectory.rows.size());
    const Tensor images = expected(results, loop.spec(), "images", "uint8",
                                   {shape[0], request.height, request.width, model.facts().picture_channels});
    on_step({0, 1, request.trajectory.rows.back().timestep, latents, [&] { return images; }});
    return images;
}

}  // namespace

Tensor draw(Model &model, const Request &request, const OnStep &on_step) {
    model.check_unchanged();
    if (!request.loop.empty()) return draw_whole(model, request, on_step);
    const std::string &name = model.roles().denoiser;
    const bool adapted = changes(request.mixtures, name);
    const Graph &denoiser = adapted ? model.adapted_graph(name) : model.graph(name);
    model.graph(model.roles().vae_decoder).check_shape("latent_sample", latents_shape(model, request));
    if (request.deepcache > 1 && !denoiser.can_skip())
        throw InputError(join("deepcache ", request.deepcache, " was asked for, and ", model.backend(),
                              " has no outermost blocks of this denoiser apart. Run: ldm-export build ",
                              model.bundle().path().string(), " --target cpu; if that says so, leave deepcache out."));
    const std::size_t each = model.facts().guidance.rows(request.guidance, request.image_guidance);
    const Shape shape = latents_shape(model, request);
    Noise noise(request.seeds, shape);
    const Trajectory &trajectory = request.trajectory;
    Start start = start_of(model, request, shape, noise);
    Tensors inputs = conditions(model, request, each, start.beside);
    if (request.reading.chunks) check_tokens(model, denoiser, inputs);
    if (adapted) {
        std::vector<Mixture> mixtures;
        for (std::size_t k = 0; k < each; ++k) mixtures.insert(mixtures.end(), request.mixtures.begin(), request.mixtures.end());
        inputs.merge(branch_arrays(denoiser.spec(), name, mixtures));
    }
    Tensor &latents = start.latents;
    const std::size_t count = latents.count();

    Shape rows = shape;
    rows[0] *= static_cast<std::int64_t>(each);
    inputs["sample"] = Tensor::zeros<float>(rows);
    inputs["timestep"] = Tensor::zeros<float>({rows[0]});
    Tensor out = Tensor::zeros<float>(rows);
    float *sample = inputs["sample"].as<float>(), *timestep = inputs["timestep"].as<float>();
    float *prediction = out.as<float>() + (each - 1) * count;
    const Call call = denoiser.bind(taken(denoiser.spec(), inputs), {{"out_sample", &out}}, request.deepcache);
    Stepper stepper(trajectory.rows, latents.as<float>(), count);
    for (std::size_t index = 0; index < trajectory.rows.size(); ++index) {
        const Row &row = trajectory.rows[index];
        stepper.network_input(row, sample);
        for (std::size_t k = 1; k < each; ++k) std::copy_n(sample, count, sample + k * count);
        std::fill_n(timestep, rows[0], static_cast<float>(row.timestep));
        model.check_unchanged();
        call();
        combine(request, out.as<float>(), count, each);
        stepper.advance(row, prediction, [&] { return noise.draw(); });
        if (start.kept) start.kept->restore(latents, index + 1);
        check_latents(latents, request, index + 1, trajectory.rows.size());
        on_step({index, trajectory.rows.size(), row.timestep, latents, [&] { return decode(model, latents, request); }});
    }
    return decode(model, latents, request);
}

}  // namespace ldm::runtime
