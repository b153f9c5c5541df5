#include "schedule.hpp"

#include "error.hpp"
#include "repr.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ldm::runtime {

namespace {

constexpr double PI = 3.14159265358979323846;

Vector rounded(Vector values) {
    for (double &value : values) value = std::nearbyint(value);  // halves to even, as numpy does
    return values;
}

Vector counted(std::size_t count) {
    Vector values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<double>(i);
    return values;
}

Vector logarithms(Vector values) {
    for (double &value : values) value = std::log(value);
    return values;
}

// Arithmetic on numbers too small to be normal depends on the thread: a library may have set its processor to take
// them for 0.
double flushed(double value) { return std::abs(value) < std::numeric_limits<double>::min() ? 0 : value; }

std::size_t index(double timestep) { return static_cast<std::size_t>(timestep); }

Grid linked(std::vector<Level> levels, Vector timesteps, Level last) {
    std::vector<Level> there(levels.begin() + 1, levels.end());
    there.push_back(last);
    return {std::move(timesteps), std::move(levels), std::move(there), {}};
}

// Fractional timesteps of noise ratios, interpolated in their logarithm: between the last training timestep with no more
// noise and the one after, as diffusers' _sigma_to_t. A table with zero terminal SNR, whose last ratio is capped, need not
// increase to its end.
Vector timesteps_of(const Vector &ratios, const Vector &table) {
    if (table.size() == 1) return Vector(ratios.size(), 0.0);
    const Vector logs = logarithms(table);
    Vector timesteps, least_after = logs;
    for (std::size_t k = least_after.size() - 1; k-- > 0;) least_after[k] = std::min(least_after[k], least_after[k + 1]);
    for (const double ratio : ratios) {
        const double wanted = std::log(ratio);
        const auto above = std::upper_bound(least_after.begin(), least_after.end(), wanted) - least_after.begin();
        const auto low = std::min(static_cast<std::size_t>(std::max<std::ptrdiff_t>(above - 1, 0)), table.size() - 2);
        const double share = (wanted - logs[low]) / (logs[low + 1] - logs[low]);
        timesteps.push_back(static_cast<double>(low) + std::min(std::max(share, 0.0), 1.0));
    }
    return timesteps;
}

std::vector<Level> levels_of(const Vector &ratios) {
    std::vector<Level> levels;
    for (const double ratio : ratios) levels.push_back(Level::from_ratio(ratio));
    return levels;
}

Level last_level(const SchedulerConfig &config, const Vector &table) {
    return Level::from_ratio(config.final_sigmas_type == "zero" ? 0.0 : table[0]);
}

}  // namespace

Vector karras_levels(double first, double last, std::size_t steps) {
    Vector ratios = linspace(std::pow(first, 1.0 / 7), std::pow(last, 1.0 / 7), steps);
    for (double &ratio : ratios) ratio = std::pow(ratio, 7);
    ratios.back() = last;  // not off by the rounding of the powers
    ratios.front() = first;
    return ratios;
}

// The variances beta_t of the forward process (DDPM, 2006.11239, section 2), each in (0, 1).
Vector SchedulerConfig::betas() const {
    const auto steps = static_cast<std::size_t>(num_train_timesteps);
    Vector betas;
    if (!trained_betas.empty()) {
        betas = trained_betas;
    } else if (beta_schedule == "linear") {
        betas = linspace(beta_start, beta_end, steps);
    } else if (beta_schedule == "scaled_linear") {
        betas = linspace(std::sqrt(beta_start), std::sqrt(beta_end), steps);
        for (double &beta : betas) beta *= beta;
    } else if (beta_schedule == "sigmoid") {
        betas = linspace(-6.0, 6.0, steps);
        for (double &beta : betas) beta = beta_start + (beta_end - beta_start) / (1 + std::exp(-beta));
    } else {  // squaredcos_cap_v2: improved DDPM, 2102.09672, eq. 17, capped as there
        const auto curve = [&](std::size_t step) {
            const double along = static_cast<double>(step) / static_cast<double>(steps);
            const double cosine = std::cos((along + 0.008) / 1.008 * PI / 2);
            return cosine * cosine;
        };
        for (std::size_t step = 0; step < steps; ++step) betas.push_back(std::min(1 - curve(step + 1) / curve(step), 0.999));
    }
    for (double &beta : betas) beta = flushed(beta);
    const auto inside = [](double beta) { return beta > 0 && beta < 1; };
    if (betas.size() == steps && std::all_of(betas.begin(), betas.end(), inside)) return betas;
    double least = betas.front(), most = betas.front();
    for (const double beta : betas) {
        if (!(beta >= least)) least = std::isnan(least) ? least : beta;
        if (!(beta <= most)) most = std::isnan(most) ? most : beta;
    }
    throw InputError(join("the noise schedule has ", betas.size(), " betas in [", brief(least), ", ", brief(most),
                          "]; it needs num_train_timesteps = ", steps,
                          " of them, inside (0, 1). Mend beta_start, beta_end or trained_betas."));
}

// With zero terminal SNR as 2305.08891, algorithm 1.
Vector SchedulerConfig::alphas_cumprod() const {
    Vector alphas_cumprod = betas();
    double product = 1;
    bool decreasing = true;
    for (double &value : alphas_cumprod) {
        value = flushed(product * (1 - value));
        decreasing = decreasing && value < product;
        product = value;
    }
    if (!(decreasing && product > 0))
        throw InputError(join("the noise schedule's alphas_cumprod go from ", brief(alphas_cumprod.front()), " to ",
                              brief(product), "; each must be smaller than the one before and above 0. Mend beta_start, ",
                              "beta_end or trained_betas."));
    if (!rescale_betas_zero_snr) return alphas_cumprod;
    if (alphas_cumprod.size() < 2)
        throw InputError("rescale_betas_zero_snr leaves nothing of 1 training timestep; it needs 2. Switch it off.");
    const double first = std::sqrt(alphas_cumprod.front()), last = std::sqrt(alphas_cumprod.back());
    for (double &value : alphas_cumprod) {
        const double root = (std::sqrt(value) - last) * first / (first - last);
        value = root * root;
    }
    return alphas_cumprod;
}

Vector SchedulerConfig::ratios() const {
    Vector ratios = alphas_cumprod();
    if (rescale_betas_zero_snr) ratios.back() = 0x1p-24;  // as in diffusers
    for (double &value : ratios) value = std::sqrt((1 - value) / value);
    return ratios;
}

// Table 2 of 2305.08891; fractional with linspace spacing.
Vector SchedulerConfig::spaced_timesteps(std::size_t steps, std::size_t points) const {
    const auto trained = static_cast<double>(num_train_timesteps);
    Vector timesteps;
    if (timestep_spacing == "linspace") {
        timesteps = linspace(0, trained - 1, points);
        std::reverse(timesteps.begin(), timesteps.end());
    } else if (timestep_spacing == "leading") {
        const double stride = std::floor(trained / static_cast<double>(points));
        for (std::size_t i = points; i-- > 0;)
            timesteps.push_back(static_cast<double>(i) * stride + static_cast<double>(steps_offset));
    } else {
        const double stride = trained + -trained / static_cast<double>(steps) - trained;  // rounded as numpy's arange
        for (std::size_t i = 0; i < steps; ++i)
            timesteps.push_back(std::nearbyint(trained + static_cast<double>(i) * stride) - 1);
    }
    timesteps.resize(steps);
    bool fit = timesteps[0] < trained;
    for (std::size_t i = 1; i < steps; ++i) fit = fit && std::nearbyint(timesteps[i]) < std::nearbyint(timesteps[i - 1]);
    if (!fit)
        throw InputError(join(steps, " steps of ", timestep_spacing, " spacing with steps_offset ", steps_offset,
                              " do not fit into ", num_train_timesteps,
                              " training timesteps; each must be a different one. Use fewer steps."));
    return timesteps;
}

Level Level::from_alphas_cumprod(double alphas_cumprod) { return {std::sqrt(alphas_cumprod), std::sqrt(1 - alphas_cumprod)}; }

Level Level::from_ratio(double ratio) { return {1 / std::hypot(1, ratio), ratio / std::hypot(1, ratio)}; }

double Level::log_snr() const { return sigma != 0 ? -std::log(ratio()) : INFINITY; }

// Integer timesteps, each step going down by num_train_timesteps / steps: DDIM and PLMS.
Grid strided_grid(const SchedulerConfig &config, std::size_t steps) {
    const Vector alphas_cumprod = config.alphas_cumprod();
    Grid grid;
    grid.timesteps = rounded(config.spaced_timesteps(steps, steps));
    const std::size_t stride = static_cast<std::size_t>(config.num_train_timesteps) / steps;
    const double last = config.set_alpha_to_one ? 1.0 : alphas_cumprod[0];
    for (std::size_t i = 0; i < steps; ++i) {
        const std::size_t t = index(grid.timesteps[i]);
        grid.here.push_back(Level::from_alphas_cumprod(alphas_cumprod[t]));
        grid.there.push_back(Level::from_alphas_cumprod(t >= stride ? alphas_cumprod[t - stride] : last));
        if (i > 0) grid.restart.push_back(Level::from_alphas_cumprod(alphas_cumprod[t + stride]));
    }
    return grid;
}

// Integer timesteps, each step going to the next one and the last to no noise: DDPM.
Grid chained_grid(const SchedulerConfig &config, std::size_t steps) {
    const Vector alphas_cumprod = config.alphas_cumprod(), timesteps = rounded(config.spaced_timesteps(steps, steps));
    std::vector<Level> levels;
    for (const double t : timesteps) levels.push_back(Level::from_alphas_cumprod(alphas_cumprod[index(t)]));
    return linked(std::move(levels), timesteps, {1.0, 0.0});
}

// Evenly picked from the original_inference_steps that the consistency model was distilled on (2310.04378).
Grid consistency_grid(const SchedulerConfig &config, std::size_t steps) {
    const std::int64_t original = config.original_inference_steps, trained = config.num_train_timesteps;
    if (!(static_cast<std::int64_t>(steps) <= original && original <= trained))
        throw InputError(join(steps, " steps of lcm with original_inference_steps ", original,
                              "; steps <= original_inference_steps <= num_train_timesteps = ", trained,
                              " must hold. Use fewer steps."));
    const double part = static_cast<double>(original) / static_cast<double>(steps);
    Vector timesteps;
    for (std::size_t i = 0; i < steps; ++i) {
        const auto picked = static_cast<std::int64_t>(std::floor(static_cast<double>(i) * part));
        timesteps.push_back(static_cast<double>((original - picked) * (trained / original) - 1));
    }
    const Vector alphas_cumprod = config.alphas_cumprod();
    std::vector<Level> levels;
    for (const double t : timesteps) levels.push_back(Level::from_alphas_cumprod(alphas_cumprod[index(t)]));
    return linked(std::move(levels), timesteps, {1.0, 0.0});
}

// Fractional timesteps with interpolated noise, the last step to none or to sigma_min: Euler and Heun.
Grid interpolated_grid(const SchedulerConfig &config, std::size_t steps) {
    const Vector table = config.ratios(), points = counted(table.size());
    Vector timesteps = config.spaced_timesteps(steps, steps), ratios;
    for (const double t : timesteps) ratios.push_back(interp(t, points, table));
    if (config.use_karras_sigmas) {
        ratios = karras_levels(ratios.front(), ratios.back(), steps);
        timesteps = timesteps_of(ratios, table);
    }
    return linked(levels_of(ratios), timesteps, last_level(config, table));
}

// Integer timesteps that leave one more for the end: DPM-Solver++ and UniPC.
Grid solver_grid(const SchedulerConfig &config, std::size_t steps) {
    const Vector table = config.ratios();
    Vector timesteps, ratios;
    if (config.use_karras_sigmas) {
        ratios = karras_levels(table.back(), table.front(), steps);
        timesteps = rounded(timesteps_of(ratios, table));
    } else {
        timesteps = rounded(config.spaced_timesteps(steps, steps + 1));
        for (const double t : timesteps) ratios.push_back(table[index(t)]);
    }
    return linked(levels_of(ratios), timesteps, last_level(config, table));
}

// `solver_grid` for a solver that cannot reach zero noise, whatever the config says: DEIS.
Grid open_ended_grid(const SchedulerConfig &config, std::size_t steps) {
    SchedulerConfig open_ended = config;
    open_ended.final_sigmas_type = "sigma_min";
    return solver_grid(open_ended, steps);
}

}  // namespace ldm::runtime
