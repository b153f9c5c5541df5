#include "flow.hpp"

#include "error.hpp"

#include <cmath>

namespace ldm::runtime {

namespace {

constexpr double NEARLY_ALL_NOISE = 1e-6;  // how much below 1 UniPC begins where it would begin at 1

double shifted(double sigma, double shift) { return shift * sigma / (1 + (shift - 1) * sigma); }

// The shift of a picture by the number of its tokens, as diffusers' pipelines calculate it; NaN where it is no finite number.
double dynamic_shift(const SchedulerConfig &config) {
    if (config.tokens == 0)
        throw InputError("the scheduler config has use_dynamic_shifting = true, which is by the number of a picture's tokens, "
                         "and none were given. Give the tokens of the picture.");
    const auto of = [](std::int64_t count) { return static_cast<double>(count); };
    const double slope =
        (config.max_shift - config.base_shift) / of(config.max_image_seq_len - config.base_image_seq_len);
    const double mu = of(config.tokens) * slope + (config.base_shift - slope * of(config.base_image_seq_len));
    const double shift = config.time_shift_type == "linear" ? mu : std::exp(mu);
    return std::isfinite(mu) && std::isfinite(shift) ? shift : std::nan("");
}

// Noise levels moved up by the shift `fixed`, or by that of the picture.
Vector moved(const SchedulerConfig &config, Vector sigmas, double fixed) {
    const double shift = config.use_dynamic_shifting ? dynamic_shift(config) : fixed;
    for (double &sigma : sigmas)
        sigma = config.use_dynamic_shifting ? shift / (shift + (1 / sigma - 1)) : shifted(sigma, shift);
    return sigmas;
}

// Noise levels stretched below 1, so that the last is `shift_terminal`, where there is one.
Vector stretched(const SchedulerConfig &config, Vector sigmas) {
    if (config.shift_terminal == 0) return sigmas;
    const double scale = (1 - sigmas.back()) / (1 - config.shift_terminal);
    if (!std::isfinite(scale)) return Vector(sigmas.size(), std::nan(""));  // refused, as is all that is no number
    for (double &sigma : sigmas) sigma = 1 - (1 - sigma) / scale;
    return sigmas;
}

// Where the distribution Beta(0.6, 0.6) has this share, in [0, 1], below: a series, bisected up to 1/2 and mirrored beyond.
double beta_quantile(double share) {
    if (share > 0.5) return 1 - beta_quantile(1 - share);
    constexpr double A = 0.6, WHOLE = 2.4153442080024718;  // Beta(a, a)
    double low = 0, high = 0.5;
    for (int halving = 0; halving < 64; ++halving) {
        const double x = (low + high) / 2;
        double term = 1, total = 1 / A;
        for (int n = 1; n < 64; ++n) {
            term *= (n - A) / n * x;
            total += term / (A + n);
        }
        (std::pow(x, A) * total / WHOLE < share ? low : high) = x;
    }
    return (low + high) / 2;
}

Grid grid_of(const SchedulerConfig &config, const Vector &sigmas, bool whole_timesteps) {
    Grid grid;
    for (const double sigma : sigmas) {
        const double timestep = sigma * static_cast<double>(config.num_train_timesteps);
        grid.timesteps.push_back(whole_timesteps ? std::floor(timestep) : timestep);
        grid.here.push_back({1 - sigma, sigma});
    }
    grid.there.assign(grid.here.begin() + 1, grid.here.end());
    grid.there.push_back({1, 0});
    return grid;
}

double lowest_of(const SchedulerConfig &config) { return 1 / static_cast<double>(config.num_train_timesteps); }

}  // namespace

// diffusers spaces them evenly between levels that are shifted, and then shifts them, so a shift counts twice.
Grid flow_euler_grid(const SchedulerConfig &config, std::size_t steps) {
    const double lowest = config.use_dynamic_shifting ? lowest_of(config) : shifted(lowest_of(config), config.shift);
    Vector sigmas = stretched(config, moved(config, linspace(1, lowest, steps), config.shift));
    const double first = sigmas.front(), last = sigmas.back();
    if (config.use_karras_sigmas) {
        sigmas = karras_levels(first, last, steps);
    } else if (config.use_exponential_sigmas) {
        sigmas = linspace(std::log(first), std::log(last), steps);
        for (double &sigma : sigmas) sigma = std::exp(sigma);
    } else if (config.use_beta_sigmas) {
        sigmas = linspace(0, 1, steps);
        for (double &sigma : sigmas) sigma = last + beta_quantile(1 - sigma) * (first - last);
    }
    return grid_of(config, sigmas, false);
}

Grid flow_solver_grid(const SchedulerConfig &config, std::size_t steps) {
    const Vector alphas = linspace(1, lowest_of(config), steps + 1);
    const double shift = config.use_dynamic_shifting ? dynamic_shift(config) : config.flow_shift;
    Vector sigmas;
    for (std::size_t k = steps; k > 0; --k) sigmas.push_back(shifted(1 - alphas[k], shift));
    if (sigmas.front() == 1) sigmas.front() = std::nan("");  // refused: nothing of the picture is left to solve for
    return grid_of(config, sigmas, true);
}

Grid flow_unipc_grid(const SchedulerConfig &config, std::size_t steps) {
    Vector sigmas = linspace(1, lowest_of(config), steps + 1);
    sigmas.pop_back();
    sigmas = stretched(config, moved(config, sigmas, config.flow_shift));
    if (std::abs(sigmas.front() - 1) < NEARLY_ALL_NOISE) sigmas.front() -= NEARLY_ALL_NOISE;
    return grid_of(config, sigmas, true);
}

// Euler's method on dx / dsigma = out; with `stochastic_sampling` x0 is noised anew to the next level.
std::vector<Row> flow_euler(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level here = grid.here[step], there = grid.there[step];
    Row row;
    row.timestep = grid.timesteps[step];
    row.keep = config.stochastic_sampling ? there.alpha : 1;
    row.direct = config.stochastic_sampling ? -there.alpha * here.sigma : there.sigma - here.sigma;
    row.noise = config.stochastic_sampling ? there.sigma : 0;
    return {row};
}

// Euler's step to x', then the trapezoid over both ends, x' + (n - s) / 2 (out' - out); outputs are remembered.
std::vector<Row> flow_heun(const SchedulerConfig &, const Grid &grid, std::size_t step, std::size_t) {
    const double span = grid.there[step].sigma - grid.here[step].sigma;
    const auto row_at = [](double timestep, Vector weights) {
        Row row;
        row.timestep = timestep;
        row.from_output = 1;
        row.keep = 1;
        row.weights = std::move(weights);
        return row;
    };
    std::vector<Row> rows{row_at(grid.timesteps[step], {span})};
    if (grid.there[step].sigma > 0) rows.push_back(row_at(grid.timesteps[step + 1], {span / 2, -span / 2}));
    return rows;
}

}  // namespace ldm::runtime
