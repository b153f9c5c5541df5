#include "onestep.hpp"

#include "error.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

double square(double value) { return value * value; }

struct Coefficients {
    double sample = 0, x0 = 0, eps = 0, noise = 0;
};

// The row of the header's formula, for latents that are 1 / input_scale of what the network sees.
//
// Unclipped, x0 and eps fold into the coefficients of x and the output. A clipped x0 has to be made first; eps keeps coming
// from the network, as diffusers has it (use_clipped_model_output = false).
std::vector<Row> one_step_row(const SchedulerConfig &config, const Grid &grid, std::size_t step, const Coefficients &of,
                              double input_scale = 1.0) {
    const Form x0 = x0_form(config, grid.here[step]), eps = eps_form(config, grid.here[step]);
    Row row;
    row.timestep = grid.timesteps[step];
    row.input_scale = input_scale;
    row.keep = of.sample + of.eps * eps.sample * input_scale;
    row.direct = of.eps * eps.output;
    row.noise = of.noise;
    if (config.clip() == 0) {
        row.keep += of.x0 * x0.sample * input_scale;
        row.direct += of.x0 * x0.output;
    } else {
        row.from_sample = x0.sample * input_scale;
        row.from_output = x0.output;
        row.clip = config.clip();
        row.weights = {of.x0};
    }
    return {row};
}

}  // namespace

Form x0_form(const SchedulerConfig &config, Level level) {
    const auto [alpha, sigma] = level;
    if (config.prediction_type == "v_prediction") return {alpha, -sigma};
    if (config.prediction_type == "sample") return {0.0, 1.0};
    if (config.prediction_type == "flow_prediction") return {1.0, -sigma};  // of latents with alpha + sigma = 1
    if (alpha == 0)
        throw InputError("prediction_type 'epsilon' cannot start at zero terminal SNR, where the noise says nothing about the "
                         "image; v_prediction and sample can. Switch rescale_betas_zero_snr off or use leading spacing.");
    return {1 / alpha, -sigma / alpha};
}

Form eps_form(const SchedulerConfig &config, Level level) {
    const auto [alpha, sigma] = level;
    if (config.prediction_type == "v_prediction") return {sigma, alpha};
    if (config.prediction_type == "sample") return {1 / sigma, -alpha / sigma};
    return {0.0, 1.0};
}

// Ancestral sampling from the posterior q(x_s | x_t, x0) (DDPM, 2006.11239, eq. 6 and 7).
std::vector<Row> ddpm(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level here = grid.here[step], there = grid.there[step];
    const double alpha_t = square(here.alpha / there.alpha), beta_t = 1 - alpha_t, left = square(there.sigma / here.sigma);
    const double variance = config.variance_type == "fixed_large" ? beta_t : left * beta_t;
    return one_step_row(config, grid, step,
                        {std::sqrt(alpha_t) * left, there.alpha * beta_t / square(here.sigma), 0.0,
                         grid.timesteps[step] > 0 ? std::sqrt(variance) : 0.0});
}

// Generalized non-Markovian sampling (DDIM, 2010.02502, eq. 12), deterministic: eta is 0.
std::vector<Row> ddim(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level there = grid.there[step];
    return one_step_row(config, grid, step, {0.0, there.alpha, std::sqrt(square(there.sigma)), 0.0});
}

// Multistep consistency sampling (LCM, 2310.04378, algorithm 3): denoise whole, then noise to the next level. The consistency
// function is c_skip * x + c_out * x0 with the boundary scalings of 2303.01469, sigma_data = 0.5.
std::vector<Row> lcm(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level there = grid.there[step];
    const double time = grid.timesteps[step] * config.timestep_scaling, data = 0.5;
    const double c_skip = square(data) / (square(time) + square(data)), c_out = time / std::hypot(time, data);
    return one_step_row(config, grid, step, {there.alpha * c_skip, there.alpha * c_out, 0.0, there.sigma});
}

// Euler's method on dx/dsigma = eps, x in EDM's scale (2206.00364, algorithm 1 without churn).
std::vector<Row> euler(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level here = grid.here[step], there = grid.there[step];
    return one_step_row(config, grid, step, {1.0, 0.0, there.ratio() - here.ratio(), 0.0}, here.alpha);
}

// Euler down below the next level, then noise up to it: the variance of DDPM's posterior in EDM's scale.
std::vector<Row> euler_ancestral(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level here = grid.here[step], there = grid.there[step];
    const double up = there.ratio() * std::sqrt(1 - square(there.ratio() / here.ratio()));
    const double down = square(there.ratio()) / here.ratio();
    return one_step_row(config, grid, step, {1.0, 0.0, down - here.ratio(), up}, here.alpha);
}

}  // namespace ldm::runtime
