// The sampling loop on a bundle: prompt in, picture out; as ldm_export/runtime/pipeline.py.
//
//   text encoders -> conditioner -> [ denoiser -> guidance -> one row of the plan ] x rows -> VAE decoder
#pragma once

#include "model.hpp"
#include "request.hpp"

#include <functional>

namespace ldm::runtime {

// The state after one network call.
struct Step {
    std::size_t index, count;
    double timestep;
    const Tensor &latents;           // float32 (B, C, h, w), the live buffer
    std::function<Tensor()> decode;  // to uint8 (B, H, W, C)
};
using OnStep = std::function<void(const Step &)>;  // throws to cancel

// Pictures, uint8 (B, H, W, C).
Tensor draw(Model &model, const Request &request, const OnStep &on_step);

}  // namespace ldm::runtime
