// Where the latents of a generation start: noise, a picture's latents, and what of a picture stays; as
// ldm_export/runtime/start.py.
#pragma once

#include "inpainting.hpp"
#include "model.hpp"
#include "noise.hpp"
#include "request.hpp"

#include <optional>

namespace ldm::runtime {

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

// What a sampling loop begins with.
struct Start {
    Tensor latents;                // float32 (B, C, h, w)
    std::optional<Tensor> beside;  // float32 (B, n, h, w), what the denoiser reads beside them
    std::optional<KeptArea> kept;  // what of a picture is put back after each row
};

// The start of what a request asks for, latents of this shape; noise is drawn in the order of diffusers' pipelines.
Start start_of(Model &model, const Request &request, const Shape &shape, Noise &noise);

}  // namespace ldm::runtime
