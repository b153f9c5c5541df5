// Samplers that remember nothing: DDPM, DDIM, LCM, Euler and Euler ancestral; as ldm_export/plan/onestep.py.
//
// Each step is x <- sample * x + x0 * (predicted x0) + eps * (predicted eps) + noise * z with four coefficients from the
// sampler's paper; the network's output gives x0 and eps by its prediction type.
#pragma once

#include "plan.hpp"
#include "schedule.hpp"

namespace ldm::runtime {

// Coefficients of x and of the network's output.
struct Form {
    double sample, output;
};

// Those that give the predicted x0 (v is 2202.00512, appendix D), and the predicted noise. x0_form throws InputError where
// the output says nothing about the image.
Form x0_form(const SchedulerConfig &config, Level level);
Form eps_form(const SchedulerConfig &config, Level level);

// The one or two rows of a step that was preceded by `age` others.
using Rows = std::vector<Row> (*)(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);

std::vector<Row> ddpm(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> ddim(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> lcm(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> euler(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> euler_ancestral(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);

}  // namespace ldm::runtime
