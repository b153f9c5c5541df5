// Noise levels of the latents between a plan's rows: what inpainting noises a picture to; as ldm_export/plan/levels.py.
#pragma once

#include "plan.hpp"

#include <utility>
#include <vector>

namespace ldm::runtime {

using Scales = std::pair<double, double>;  // image_scale and noise_scale of latents

// Levels of the latents before each row of plan.starting_at(start), start 0 being the run from noise. Throws InputError if
// the table does not tell one, as where two steps have one timestep and another number of rows than steps.
std::vector<Scales> row_levels(const Plan &plan, std::size_t start);

}  // namespace ldm::runtime
