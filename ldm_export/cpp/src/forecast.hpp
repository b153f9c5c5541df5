// Forecast plans: steps whose network output is extrapolated instead of computed, folded into rows of one call each; as
// ldm_export/plan/forecast.py, whose docstring has the formula.
#pragma once

#include "onestep.hpp"

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

constexpr const char *CALLS = "-calls";  // between a sampler and a number of calls in the name of a plan's sampler

// The sampler and the number of calls that a name stands for: ddim-calls16 is ddim with 16.
std::pair<std::string, std::optional<std::size_t>> forecast_of(const std::string &name);

// The plan with only so many of its network calls, of the same steps; `denoised` is what gives the predicted x0 at each row,
// if the sampler adds noise. An entry from an image makes its first calls without a gap, as many as the whole does and at
// most three, and then the same calls. Throws InputError if it cannot be folded: the sentence says why, and what can be.
Plan forecast_plan(const Plan &whole, std::size_t calls, const std::vector<Form> &denoised);

}  // namespace ldm::runtime
