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
    Tensor unscaled = latents;
    const auto factor = static_cast<float>(facts.scaling_factor);
    std::for_each(unscaled.as<float>(), unscaled.as<float>() + unscaled.count(), [&](float &x) { x /= factor; });
    const Graph &decoder = model.graph("vae_decoder");
    const std::int64_t batch = latents.shape[0], channels = facts.picture_channels;
    const std::int64_t height = latents.shape[2] * facts.pixels_per_latent, width = latents.shape[3] * facts.pixels_per_latent;
    const Tensor sample = expected(decoder.run({{"latent_sample", &unscaled}}), decoder.spec(), "sample", "float32",
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

// A picture's scaled latents, drawn from the encoder's distribution with the pictures' own noise.
Tensor encode(Model &model, Tensor &image, const Shape &shape, Noise &noise) {
    const Graph &encoder = model.graph("vae_encoder");
    Shape doubled = shape;
    doubled[1] *= 2;
    const Tensor parameters = expected(encoder.run({{"sample", &image}}), encoder.spec(), "latent_parameters", "float32",
                                       doubled);
    Tensor latents = Tensor::zeros<float>(shape);
    const std::size_t batch = static_cast<std::size_t>(shape[0]), each = latents.count() / batch;
    const auto mean = [&](std::size_t k, std::size_t i) { return parameters.as<float>()[2 * k * each + i]; };
    const auto logvar = [&](std::size_t k, std::size_t i) { return parameters.as<float>()[(2 * k + 1) * each + i]; };
    bool certain = true;  // as AutoencoderTiny's latents are, which take no noise
    for (std::size_t k = 0; k < batch; ++k)
        for (std::size_t i = 0; i < each; ++i) certain = certain && logvar(k, i) <= -30.0f;
    const float *z = certain ? nullptr : noise.draw();
    const auto factor = static_cast<float>(model.facts().scaling_factor);
    for (std::size_t k = 0; k < batch; ++k)
        for (std::size_t i = 0; i < each; ++i) {
            float x = mean(k, i);
            if (!certain) {
                const double deviation = std::exp(0.5 * static_cast<double>(std::clamp(logvar(k, i), -30.0f, 20.0f)));
                x += static_cast<float>(deviation) * z[k * each + i];
            }
            latents.as<float>()[k * each + i] = x * factor;
        }
    return latents;
}

// Rows as one array (B, ...).
Tensor stacked(const std::vector<const Tensor *> &rows) {
    for (const Tensor *row : rows)
        if (row->shape != rows[0]->shape)
            throw BundleError("The text encoder gives another size from prompt to prompt. Export the bundle anew.");
    Shape shape = rows[0]->shape;
    shape.insert(shape.begin(), static_cast<std::int64_t>(rows.size()));
    Tensor whole = Tensor::zeros<float>(shape);
    auto out = whole.data.begin();
    for (const Tensor *row : rows) out = std::copy(row->data.begin(), row->data.end(), out);
    return whole;
}

// Sinusoids of 1000 (w - 1), the guidance embedding of LCM (2310.04378, section 4.2).
Tensor guidance_embedding(double guidance, std::int64_t rows, const TensorSpec &told) {
    const bool fits = told.shape.size() == 2 && told.shape[1].size >= 4;
    if (!fits) throw BundleError("The UNet's timestep_cond has no size that is known. Export the bundle anew.");
    const std::int64_t dim = told.shape[1].size, half = dim / 2;
    Tensor embedding = Tensor::zeros<float>({rows, dim});
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t i = 0; i < half; ++i) {
            const double frequency = std::exp(-std::log(10000.0) / static_cast<double>(half - 1) * static_cast<double>(i));
            const double angle = 1000.0 * (guidance - 1.0) * frequency;
            embedding.as<float>()[row * dim + i] = static_cast<float>(std::sin(angle));
            embedding.as<float>()[row * dim + half + i] = static_cast<float>(std::cos(angle));
        }
    return embedding;
}

// The UNet's inputs beside latents and timestep; with guidance the negative prompts' rows come first.
Tensors conditions(Model &model, const Request &request, bool guided) {
    const GraphSpec &unet = model.spec("unet");
    const auto rows = static_cast<std::int64_t>(request.batch() * (guided ? 2 : 1));
    Tensors inputs;
    if (unet.input("time_ids") != nullptr) {  // original size, crop corner, target size (2307.01952, section 2.2)
        const auto height = static_cast<float>(request.height), width = static_cast<float>(request.width);
        Tensor &ids = inputs["time_ids"] = Tensor::zeros<float>({rows, 6});
        for (std::int64_t row = 0; row < rows; ++row) {
            const float values[] = {height, width, 0, 0, height, width};
            std::copy(std::begin(values), std::end(values), ids.as<float>() + row * 6);
        }
    }
    if (const TensorSpec *told = unet.input("timestep_cond"))
        inputs["timestep_cond"] = guidance_embedding(request.guidance, rows, *told);
    if (request.class_labels) {
        Tensor &labels = inputs["class_labels"] = Tensor::zeros<std::int64_t>({rows});
        for (std::int64_t row = 0; row < rows; ++row)
            labels.as<std::int64_t>()[row] =
                request.class_labels->as<std::int64_t>()[row % static_cast<std::int64_t>(request.batch())];
    }
    if (request.prompts.empty()) return inputs;
    std::vector<SharedTensors> encoded = model.encode(request.prompts);
    if (guided) {
        std::vector<SharedTensors> negative = model.encode(request.negative_prompts);
        if (model.facts().zeros_for_empty_prompt && request.no_negative_prompt)
            for (SharedTensors &row : negative) {
                Tensors zeros = *row;
                for (auto &[_, tensor] : zeros) std::fill(tensor.data.begin(), tensor.data.end(), std::byte{0});
                row = std::make_shared<const Tensors>(std::move(zeros));
            }
        encoded.insert(encoded.begin(), negative.begin(), negative.end());
    }
    for (const auto &[name, _] : *encoded[0]) {
        std::vector<const Tensor *> all;
        for (const SharedTensors &row : encoded) all.push_back(&row->at(name));
        inputs[name] = stacked(all);
    }
    return inputs;
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
    for (const auto &[name, prompts] : {std::make_pair("input_ids", &request.prompts),
                                        std::make_pair("negative_input_ids", &request.negative_prompts)}) {
        if (prompts->empty()) continue;
        const Tokenizer &tokenizer = model.tokenizers().at(0);
        const auto length = static_cast<std::int64_t>(tokenizer.max_length());
        Tensor &ids = given[name] = Tensor::zeros<TokenId>({shape[0], length});
        for (std::size_t k = 0; k < prompts->size(); ++k) {
            const std::vector<TokenId> row = tokenizer((*prompts)[k], [&](const std::string &what) { model.warn(what); });
            std::copy(row.begin(), row.end(), ids.as<TokenId>() + static_cast<std::int64_t>(k) * length);
        }
    }
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
    const Graph &unet = model.graph("unet");
    model.graph("vae_decoder").check_shape("latent_sample", latents_shape(model, request));
    if (request.deepcache > 1 && !unet.can_skip())
        throw InputError(join("deepcache ", request.deepcache, " was asked for, and ", model.backend(),
                              " has no outermost blocks of this UNet apart. Run: ldm-export build ",
                              model.bundle().path().string(), " --target cpu; if that says so, leave deepcache out."));
    const bool guided = !request.prompts.empty() && request.guidance > 1 && !model.facts().takes_scale;
    Tensors inputs = conditions(model, request, guided);

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
    inputs["timestep"] = Tensor::zeros<float>({});
    Tensor out = Tensor::zeros<float>(rows);
    float *sample = inputs["sample"].as<float>(), *timestep = inputs["timestep"].as<float>();
    float *prediction = out.as<float>() + (guided ? count : 0);
    const auto guidance = static_cast<float>(request.guidance);
    const Call call = unet.bind(taken(unet.spec(), inputs), {{"out_sample", &out}}, request.deepcache);
    Stepper stepper(trajectory.rows, x, count);
    for (std::size_t index = 0; index < trajectory.rows.size(); ++index) {
        const Row &row = trajectory.rows[index];
        stepper.network_input(row, sample);
        if (guided) std::copy_n(sample, count, sample + count);
        *timestep = static_cast<float>(row.timestep);
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
