#include "draw.hpp"

#include "error.hpp"
#include "noise.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

// Noise for a batch, each picture by its own seed.
class Noise {
  public:
    Noise(const std::vector<std::int64_t> &seeds, const Shape &latents)
        : values_(Tensor::zeros<float>(latents)), each_(values_.count() / seeds.size()) {
        for (const std::int64_t seed : seeds) generators_.emplace_back(seed);
    }

    const float *draw() {
        float *out = values_.as<float>();
        for (Generator &generator : generators_) {
            generator.randn(out, each_);
            out += each_;
        }
        return values_.as<float>();
    }

  private:
    Tensor values_;
    std::size_t each_;
    std::vector<Generator> generators_;
};

Shape latents_shape(const Model &model, const Request &request) {
    const Facts &facts = model.facts();
    return {static_cast<std::int64_t>(request.batch()), facts.latent_channels, request.height / facts.pixels_per_latent,
            request.width / facts.pixels_per_latent};
}

// An output of a graph, which must have this type and shape.
Tensor expected(Tensors outputs, const GraphSpec &graph, const std::string &name, const char *dtype, const Shape &shape) {
    const auto found = outputs.find(name);
    if (found == outputs.end() || found->second.dtype != dtype || found->second.shape != shape)
        throw BundleError(join(graph.path, " gives no '", name, "' of the size that it must. Export the bundle anew."));
    return std::move(found->second);
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
    Tensor images = Tensor::zeros<std::uint8_t>({batch, height, width, channels});
    const float *in = sample.as<float>();
    for (std::int64_t k = 0; k < batch; ++k)
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t i = 0; i < height * width; ++i) {
                const float level = std::max(0.0f, std::min(*in++ / 2 + 0.5f, 1.0f));
                images.as<std::uint8_t>()[(k * height * width + i) * channels + c] =
                    static_cast<std::uint8_t>(std::nearbyint(level * 255));
            }
    return images;
}

// A picture's latents, drawn from the encoder's distribution with the pictures' own noise; where they are certain, as they
// are.
Tensor encode(Model &model, Tensor &image, const Shape &shape, Noise &noise) {
    const Graph &encoder = model.graph(model.roles().vae_encoder);
    Tensors outputs = encoder.run({{"sample", &image}});
    if (outputs.count("latent_sample") != 0)
        return expected(std::move(outputs), encoder.spec(), "latent_sample", "float32", shape);
    Shape doubled = shape;
    doubled[1] *= 2;
    const Tensor parameters = expected(std::move(outputs), encoder.spec(), "latent_parameters", "float32", doubled);
    Tensor latents = Tensor::zeros<float>(shape);
    const std::size_t batch = static_cast<std::size_t>(shape[0]), each = latents.count() / batch;
    const float *z = noise.draw();
    for (std::size_t k = 0; k < batch; ++k)
        for (std::size_t i = 0; i < each; ++i) {
            const float mean = parameters.as<float>()[2 * k * each + i];
            const double logvar = parameters.as<float>()[(2 * k + 1) * each + i];
            latents.as<float>()[k * each + i] = mean + static_cast<float>(std::exp(0.5 * logvar)) * z[k * each + i];
        }
    return latents;
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
Tensor by_row(std::size_t batch, bool guided, float negative, float prompt) {
    Tensor made = Tensor::zeros<float>({static_cast<std::int64_t>(batch * (guided ? 2 : 1))});
    float *rows = made.as<float>();
    if (guided) rows = std::fill_n(rows, batch, negative);
    std::fill_n(rows, batch, prompt);
    return made;
}

// What a request gives to graphs, by name; as request_sources in ldm_export/runtime/conditioning.py.
Tensors request_sources(const Request &request, bool guided) {
    Tensors made;
    made["height"] = scalar(request.height);
    made["width"] = scalar(request.width);
    made["guidance"] = scalar(request.guidance);
    made["guidance_weight"] = scalar(request.guidance - 1.0);
    made["has_prompt"] = by_row(request.batch(), guided, request.no_negative_prompt ? 0.0f : 1.0f, 1.0f);
    made["is_negative"] = by_row(request.batch(), guided, 1.0f, 0.0f);
    if (request.class_labels) {
        Tensor &labels = made["class_labels"] = *request.class_labels;
        if (guided) {
            const std::vector<std::byte> once = labels.data;
            labels.data.insert(labels.data.end(), once.begin(), once.end());
            labels.shape[0] *= 2;
        }
    }
    return made;
}

TensorRefs taken(const GraphSpec &graph, Tensors &there);

using Chunks = std::vector<std::vector<TokenRow>>;  // of one prompt, rows by encoder

// The denoiser's inputs by one chunk of each prompt, of the empty text where a prompt has no such chunk.
Tensors conditions_of_chunk(Model &model, Tensors known, const std::vector<Chunks> &prompts,
                            const std::vector<Chunks> &negatives, std::size_t number) {
    const Roles &roles = model.roles();
    if (!prompts.empty()) {
        const auto encode = [&](const std::vector<Chunks> &read) {
            Chunks chunks;
            for (const Chunks &own : read) chunks.push_back(number < own.size() ? own[number] : model.read("", {})[0]);
            return chunks.empty() ? std::vector<SharedTensors>() : model.encode(chunks);
        };
        std::vector<SharedTensors> encoded = encode(prompts);
        const std::vector<SharedTensors> negative = encode(negatives);
        encoded.insert(encoded.begin(), negative.begin(), negative.end());
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

// The denoiser's inputs beside latents and timestep; with guidance the negative prompts' rows come first.
Tensors conditions(Model &model, const Request &request, bool guided) {
    const Tensors known = request_sources(request, guided);
    std::vector<Chunks> prompts, negatives;
    std::size_t count = 1;
    for (auto [given, read] : {std::pair(&request.prompts, &prompts), std::pair(&request.negative_prompts, &negatives)}) {
        if (read == &negatives && !guided) continue;
        for (const std::string &prompt : *given) read->push_back(model.read(prompt, request.reading));
        for (const Chunks &chunks : *read) count = std::max(count, chunks.size());
    }
    std::vector<Tensors> made;
    for (std::size_t k = 0; k < count; ++k) made.push_back(conditions_of_chunk(model, known, prompts, negatives, k));
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
    given["has_negative_prompt"] = by_row(request.batch(), false, 0.0f, request.no_negative_prompt ? 0.0f : 1.0f);
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
    const Graph &denoiser = model.graph(model.roles().denoiser);
    model.graph(model.roles().vae_decoder).check_shape("latent_sample", latents_shape(model, request));
    if (request.deepcache > 1 && !denoiser.can_skip())
        throw InputError(join("deepcache ", request.deepcache, " was asked for, and ", model.backend(),
                              " has no outermost blocks of this denoiser apart. Run: ldm-export build ",
                              model.bundle().path().string(), " --target cpu; if that says so, leave deepcache out."));
    const bool guided = model.facts().guidance.takes_two_rows(request.guidance);
    Tensors inputs = conditions(model, request, guided);
    if (request.reading.chunks) check_tokens(model, denoiser, inputs);

    const Shape shape = latents_shape(model, request);
    Noise noise(request.seeds, shape);
    const Trajectory &trajectory = request.trajectory;
    std::optional<Tensor> start;
    if (request.image) {
        Tensor image = *request.image;
        start = encode(model, image, shape, noise);
    }
    Tensor latents = Tensor::zeros<float>(shape);
    const std::size_t count = latents.count();
    float *x = latents.as<float>();
    const float *z = noise.draw();
    for (std::size_t i = 0; i < count; ++i) {
        x[i] = z[i] * static_cast<float>(trajectory.noise_scale);
        if (start) x[i] += start->as<float>()[i] * static_cast<float>(trajectory.image_scale);
    }

    Shape rows = shape;
    rows[0] *= guided ? 2 : 1;
    inputs["sample"] = Tensor::zeros<float>(rows);
    inputs["timestep"] = Tensor::zeros<float>({rows[0]});
    Tensor out = Tensor::zeros<float>(rows);
    float *sample = inputs["sample"].as<float>(), *timestep = inputs["timestep"].as<float>();
    float *prediction = out.as<float>() + (guided ? count : 0);
    const auto guidance = static_cast<float>(request.guidance);
    const Call call = denoiser.bind(taken(denoiser.spec(), inputs), {{"out_sample", &out}}, request.deepcache);
    Stepper stepper(trajectory.rows, x, count);
    for (std::size_t index = 0; index < trajectory.rows.size(); ++index) {
        const Row &row = trajectory.rows[index];
        stepper.network_input(row, sample);
        if (guided) std::copy_n(sample, count, sample + count);
        std::fill_n(timestep, rows[0], static_cast<float>(row.timestep));
        model.check_unchanged();
        call();
        if (guided)  // negative + guidance * (prompt - negative)
            for (std::size_t i = 0; i < count; ++i)
                prediction[i] = (prediction[i] - out.as<float>()[i]) * guidance + out.as<float>()[i];
        stepper.advance(row, prediction, [&] { return noise.draw(); });
        check_latents(latents, request, index + 1, trajectory.rows.size());
        on_step({index, trajectory.rows.size(), row.timestep, latents, [&] { return decode(model, latents); }});
    }
    return decode(model, latents);
}

}  // namespace ldm::runtime
