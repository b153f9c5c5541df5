#include "multistep.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace ldm::runtime {

namespace {

// Coefficients over up to five predictions.
struct Mixture {
    std::array<double, 5> of{};

    static Mixture unit(std::size_t k) {
        Mixture m;
        m.of[k] = 1;
        return m;
    }
};

template <class Operation>
Mixture combined(const Mixture &a, const Mixture &b, Operation operation) {
    Mixture result;
    std::transform(a.of.begin(), a.of.end(), b.of.begin(), result.of.begin(), operation);
    return result;
}

Mixture operator+(const Mixture &a, const Mixture &b) { return combined(a, b, std::plus<>()); }
Mixture operator-(const Mixture &a, const Mixture &b) { return combined(a, b, std::minus<>()); }
Mixture operator*(double scale, const Mixture &m) {
    return combined(m, m, [&](double value, double) { return scale * value; });
}
Mixture operator/(const Mixture &m, double scale) {
    return combined(m, m, [&](double value, double) { return value / scale; });
}

// Linear multistep weights by order, newest first (PNDM, 2202.09778, eq. 9).
const std::vector<Vector> ADAMS_BASHFORTH{
    {1.0},
    {3.0 / 2, -1.0 / 2},
    {23.0 / 12, -16.0 / 12, 5.0 / 12},
    {55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24},
};

// The row of a solver on the variance-preserving latents, trailing zero weights dropped.
std::vector<Row> solver_row(const Grid &grid, std::size_t step, Form form, double keep, const Vector &total, double noise) {
    Row row;
    row.timestep = grid.timesteps[step];
    row.from_sample = form.sample;
    row.from_output = form.output;
    row.keep = keep;
    row.weights = total;
    while (!row.weights.empty() && row.weights.back() == 0) row.weights.pop_back();
    row.noise = noise;
    return {row};
}

Vector vector_of(const Mixture &m, std::size_t from = 0) { return {m.of.begin() + static_cast<std::ptrdiff_t>(from), m.of.end()}; }

// The order that the end of a short run allows (2211.01095, appendix D: stable under 15 steps).
std::size_t order_left(const SchedulerConfig &config, const Grid &grid, std::size_t step) {
    const std::size_t steps = grid.timesteps.size();
    return config.lower_order_final && steps < 15 ? steps - step : static_cast<std::size_t>(config.solver_order);
}

std::size_t order_of(const SchedulerConfig &config, std::size_t age, std::size_t left) {
    return std::min({static_cast<std::size_t>(config.solver_order), age + 1, left});
}

std::vector<Row> dpm_solver_row(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age,
                                bool stochastic) {
    const Level here = grid.here[step], there = grid.there[step];
    std::size_t order = order_of(config, age, order_left(config, grid, step));
    const double h = there.log_snr() - here.log_snr();
    if (h == 0 || h == INFINITY || (config.euler_at_final && step == grid.timesteps.size() - 1)) order = 1;
    const double span = stochastic ? 2 * h : h, phi = -std::expm1(-span);
    const double keep = there.sigma / here.sigma * (stochastic ? std::exp(-h) : 1.0);
    const double noise = stochastic ? there.sigma * std::sqrt(phi) : 0.0;
    const Mixture m0 = Mixture::unit(0), m1 = Mixture::unit(1), m2 = Mixture::unit(2);
    Mixture total = phi * m0;
    if (order > 1) {
        const auto log_snr = [&](std::size_t k) { return grid.here[step - k].log_snr(); };
        const double r0 = (log_snr(0) - log_snr(1)) / h;
        Mixture slope = (m0 - m1) / r0;
        if (order == 3) {
            const double r1 = (log_snr(1) - log_snr(2)) / h;
            const Mixture older = (m1 - m2) / r1, curvature = (slope - older) / (r0 + r1);
            slope = slope + r0 * curvature;
            total = total + (1 - phi / h) * slope + (0.5 - (h - phi) / (h * h)) * curvature;
        } else if (config.solver_type == "heun") {
            total = total + (1 - phi / span) * slope;
        } else {
            total = total + phi / 2 * slope;
        }
    }
    return solver_row(grid, step, x0_form(config, here), keep, vector_of(there.alpha * total), noise);
}

// What UniP or UniC adds to (sigma_t / sigma_s) x in this step, over (m at its end, m0, m1, m2, unused).
Mixture unipc_weights(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t order, bool corrector) {
    const Level here = grid.here[step], there = grid.there[step];
    const double h = there.log_snr() - here.log_snr();
    Vector r;
    std::vector<Mixture> slopes;
    for (std::size_t k = 1; k < order; ++k) {
        r.push_back((grid.here[step - k].log_snr() - here.log_snr()) / h);
        slopes.push_back((Mixture::unit(k + 1) - Mixture::unit(1)) / r.back());
    }
    if (corrector) {
        r.push_back(1.0);
        slopes.push_back(Mixture::unit(0) - Mixture::unit(1));
    }
    const double b_of_h = config.solver_type == "bh1" ? -h : std::expm1(-h);
    Vector rho(r.size(), 0.5);
    if (r.size() > 1) {
        double phi = std::expm1(-h) / -h - 1, factorial = 1;
        Vector moments;
        std::vector<Vector> powers;  // row k: every r to the k
        for (std::size_t k = 1; k <= r.size(); ++k) {
            moments.push_back(phi * factorial / b_of_h);
            factorial *= static_cast<double>(k + 1);
            phi = phi / -h - 1 / factorial;
            Vector row(r.size(), 1.0);
            if (k > 1) std::transform(powers.back().begin(), powers.back().end(), r.begin(), row.begin(), std::multiplies<>());
            powers.push_back(row);
        }
        rho = solve(powers, moments);
    }
    Mixture total = -there.alpha * std::expm1(-h) * Mixture::unit(1);
    for (std::size_t k = 0; k < rho.size(); ++k) total = total - there.alpha * b_of_h * rho[k] * slopes[k];
    return total;
}

}  // namespace

// Pseudo linear multistep (PNDM, 2202.09778, eq. 9 and 11) with the doubled first step of diffusers.
//
// A step is DDIM's with a mixture of the last four outputs for the output. The first step is taken, its end looked at, and
// taken again from its beginning with the mean of both outputs; the second output then leaves the history.
std::vector<Row> plms(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age) {
    const auto transfer = [&](Level here, Level there) -> Form {  // coefficients in DDIM's deterministic step
        const Form x0 = x0_form(config, here), eps = eps_form(config, here);
        return {there.alpha * x0.sample + there.sigma * eps.sample, there.alpha * x0.output + there.sigma * eps.output};
    };
    const auto [keep, gain] = transfer(grid.here[step], grid.there[step]);
    Row row;
    row.timestep = grid.timesteps[step];
    row.from_output = 1.0;
    row.keep = keep;
    for (const double weight : ADAMS_BASHFORTH[std::min<std::size_t>(age, 3)]) row.weights.push_back(gain * weight);
    if (0 < age && age < 4)  // the second output of the doubled step
        row.weights.insert(row.weights.begin() + static_cast<std::ptrdiff_t>(age), 0.0);
    if (age > 0 || step == grid.timesteps.size() - 1) return {row};
    const auto [again, half] = transfer(grid.restart[step], grid.here[step + 1]);
    const double start = again / keep;  // the step's beginning is (x - gain * h_1) / keep
    Row second;
    second.timestep = grid.timesteps[step + 1];
    second.from_output = 1.0;
    second.keep = start;
    second.weights = {half / 2, half / 2 - start * gain};
    return {row, second};
}

// Euler's step, then the trapezoid over both ends (EDM, 2206.00364, algorithm 1 without churn); x0 is remembered.
//
// With s and n the ratios here and there, Euler ends at x' = (n/s) x + (1 - n/s) h, so the trapezoid's beginning is
// x = (s/n) x' + (1 - s/n) h_1 and its slope the mean of (x - h_1) / s and (x' - h_0) / n.
std::vector<Row> heun(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t) {
    const Level here = grid.here[step], there = grid.there[step];
    const double s = here.ratio(), n = there.ratio();
    const auto row_at = [&](double timestep, Level level, double keep, Vector weights) {
        const Form form = x0_form(config, level);
        Row row;
        row.timestep = timestep;
        row.input_scale = level.alpha;
        row.from_sample = form.sample * level.alpha;
        row.from_output = form.output;
        row.clip = config.clip();
        row.keep = keep;
        row.weights = std::move(weights);
        return row;
    };
    std::vector<Row> rows{row_at(grid.timesteps[step], here, n / s, {1 - n / s})};
    if (there.sigma > 0) {
        const double half = (n - s) / (2 * n);
        const double timestep = step + 1 < grid.timesteps.size() ? grid.timesteps[step + 1] : NAN;  // it ends at no noise
        rows.push_back(row_at(timestep, there, 1, {-half, half}));
    }
    return rows;
}

// DPM-Solver++ multistep, ODE (2211.01095, eq. 8, 9, algorithm 2 and appendix D).
std::vector<Row> dpm_solver_2m(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age) {
    return dpm_solver_row(config, grid, step, age, false);
}

// DPM-Solver++ multistep, SDE (2211.01095, eq. 18 and appendix C).
std::vector<Row> dpm_solver_2m_sde(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age) {
    return dpm_solver_row(config, grid, step, age, true);
}

// Unified predictor-corrector on x0 (UniPC, 2302.04867, algorithms 1 and 2, data prediction of appendix E).
//
// The prediction at x corrects x itself before the next predictor leaves from it. Predictor p and corrector c of the step
// that led here leave from the same place with the same keep, so the corrected sample is x + (c - p) . m.
std::vector<Row> unipc(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age) {
    const auto order_at = [&](std::size_t at, std::size_t its_age) {
        const std::size_t left = config.lower_order_final ? grid.timesteps.size() - at
                                                          : static_cast<std::size_t>(config.solver_order);
        return order_of(config, its_age, left);
    };
    const Level here = grid.here[step], there = grid.there[step];
    Vector total = vector_of(unipc_weights(config, grid, step, order_at(step, age), false), 1);
    const double keep = there.sigma / here.sigma;
    if (age > 0) {
        const std::size_t previous = order_at(step - 1, age - 1);
        const Mixture corrected = keep * unipc_weights(config, grid, step - 1, previous, true);
        const Mixture predicted = keep * unipc_weights(config, grid, step - 1, previous, false);
        for (std::size_t k = 0; k < total.size(); ++k) total[k] = total[k] + corrected.of[k] - predicted.of[k];
    }
    return solver_row(grid, step, x0_form(config, here), keep, total, 0.0);
}

// Exponential integrator with eps interpolated in log ratio (DEIS, 2204.13902, eq. 15, the log-rho variant).
//
// In EDM's scale dx/dratio = eps. With u = log ratio a Lagrange basis polynomial p(u) integrates in closed form, the
// antiderivative of p(u) e**u being (p - p' + p'') e**u for degree 2.
std::vector<Row> deis(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age) {
    const Level here = grid.here[step], there = grid.there[step];
    const std::size_t order = order_of(config, age, order_left(config, grid, step));
    Vector nodes;
    for (std::size_t k = 0; k < order; ++k) nodes.push_back(-grid.here[step - k].log_snr());
    Vector weights;
    for (std::size_t k = 0; k < order; ++k) {
        std::array<double, 3> p{1.0, 0.0, 0.0};  // the basis polynomial's coefficients, the constant first
        for (std::size_t other = 0; other < order; ++other)
            if (other != k) {
                const double span = nodes[k] - nodes[other];
                p = {-nodes[other] * p[0] / span, (p[0] - nodes[other] * p[1]) / span, (p[1] - nodes[other] * p[2]) / span};
            }
        const auto primitive = [&](double u) { return p[0] - p[1] + 2 * p[2] + u * (p[1] - 2 * p[2] + u * p[2]); };
        const double ends = primitive(-there.log_snr()) * there.ratio() - primitive(-here.log_snr()) * here.ratio();
        weights.push_back(there.alpha * ends);
    }
    return solver_row(grid, step, eps_form(config, here), there.alpha / here.alpha, weights, 0.0);
}

}  // namespace ldm::runtime
