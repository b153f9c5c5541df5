#include "start.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

bool is_certain(Model &model) {  // whether a picture has one latents, not a distribution of some
    const std::vector<TensorSpec> &outputs = model.spec(model.roles().vae_encoder).outputs;
    return std::any_of(outputs.begin(), outputs.end(), [](const TensorSpec &tensor) { return tensor.name == "latent_sample"; });
}

// A picture's latents, drawn from the encoder's distribution with the pictures' own noise; where they are certain, as they
// are, and their mean where there is no noise.
Tensor encode(Model &model, Tensor image, const Shape &shape, Noise *noise) {
    const Graph &encoder = model.graph(model.roles().vae_encoder);
    Tensors outputs = encoder.run({{"sample", &image}});
    if (outputs.count("latent_sample") != 0)
        return expected(std::move(outputs), encoder.spec(), "latent_sample", "float32", shape);
    Shape doubled = shape;
    doubled[1] *= 2;
    const Tensor parameters = expected(std::move(outputs), encoder.spec(), "latent_parameters", "float32", doubled);
    Tensor latents = Tensor::zeros<float>(shape);
    const std::size_t batch = static_cast<std::size_t>(shape[0]), each = latents.count() / batch;
    const float *z = noise == nullptr ? nullptr : noise->draw();
    for (std::size_t k = 0; k < batch; ++k)
        for (std::size_t i = 0; i < each; ++i) {
            const float mean = parameters.as<float>()[2 * k * each + i];
            const double logvar = parameters.as<float>()[(2 * k + 1) * each + i];
            latents.as<float>()[k * each + i] =
                z == nullptr ? mean : mean + static_cast<float>(std::exp(0.5 * logvar)) * z[k * each + i];
        }
    return latents;
}

// Rows of two arrays side by side on the channel axis.
Tensor joined(const Tensor &first, const Tensor &second) {
    Tensor whole{first.dtype, first.shape, {}};
    whole.shape[1] += second.shape[1];
    const std::size_t batch = static_cast<std::size_t>(first.shape[0]);
    const std::size_t bytes = first.data.size() / batch, more = second.data.size() / batch;
    for (std::size_t k = 0; k < batch; ++k) {
        const auto here = first.data.begin() + static_cast<std::ptrdiff_t>(k * bytes);
        const auto there = second.data.begin() + static_cast<std::ptrdiff_t>(k * more);
        whole.data.insert(whole.data.end(), here, here + static_cast<std::ptrdiff_t>(bytes));
        whole.data.insert(whole.data.end(), there, there + static_cast<std::ptrdiff_t>(more));
    }
    return whole;
}

}  // namespace

Start start_of(Model &model, const Request &request, const Shape &shape, Noise &noise) {
    const Trajectory &trajectory = request.trajectory;
    const bool edits = model.facts().edits, inpaints = model.facts().inpaints;
    std::optional<Tensor> image;
    if (request.image && !edits && (!inpaints || trajectory.image_scale != 0))
        image = encode(model, *request.image, shape, &noise);
    Start start{Tensor::zeros<float>(shape), std::nullopt, std::nullopt};
    Tensor drawn = Tensor::zeros<float>(shape);
    std::copy_n(noise.draw(), drawn.count(), drawn.as<float>());
    float *x = start.latents.as<float>();
    for (std::size_t i = 0; i < drawn.count(); ++i) {
        x[i] = drawn.as<float>()[i] * static_cast<float>(trajectory.noise_scale);
        if (image) x[i] += image->as<float>()[i] * static_cast<float>(trajectory.image_scale);
    }
    const std::size_t factor = model.facts().pixels_per_latent;
    if (edits) {
        start.beside = encode(model, *request.image, shape, nullptr);
    } else if (inpaints) {
        const Tensor uncovered_latents = encode(model, uncovered(*request.image, *request.mask), shape, &noise);
        start.beside = joined(latents_mask(*request.mask, factor, true), uncovered_latents);
    } else if (request.mask) {
        if (!is_certain(model)) noise.draw();  // of what diffusers' pipelines make for no use
        start.kept.emplace(
            KeptArea{*std::move(image), std::move(drawn), latents_mask(*request.mask, factor), request.levels});
    }
    return start;
}

}  // namespace ldm::runtime
