// Noise schedules, timestep spacing and the grid of noise levels that a solver walks along; as ldm_export/plan/schedule.py.
//
// A noise level is x = alpha * x0 + sigma * eps with alpha**2 + sigma**2 == 1 (DDPM, 2006.11239, eq. 4, where alpha**2 is
// alphas_cumprod). The EDM family (2206.00364) scales it to x / alpha = x0 + ratio * eps, and DPM-Solver (2206.00927)
// measures it by log_snr = log(alpha / sigma). Keys, meanings and defaults are those of diffusers' scheduler_config.json.
#pragma once

#include "arrays.hpp"
#include "json.hpp"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

using Defaults = std::vector<std::pair<std::string, Json>>;   // keys, with the value where a config has none
using Only = std::vector<std::pair<std::string, Json::Array>>;  // keys, with the values that are supported

// A checked scheduler_config.json, as one sampler reads it.
struct SchedulerConfig {
    std::int64_t num_train_timesteps = 1000;
    double beta_start = 0.0001;
    double beta_end = 0.02;
    std::string beta_schedule = "linear";
    Vector trained_betas;
    std::string prediction_type = "epsilon";
    std::string timestep_spacing = "leading";
    std::int64_t steps_offset = 0;
    bool rescale_betas_zero_snr = false;
    bool set_alpha_to_one = true;
    bool clip_sample = false;
    double clip_sample_range = 1.0;
    std::string variance_type = "fixed_small";
    bool use_karras_sigmas = false;
    std::string final_sigmas_type = "zero";
    std::int64_t solver_order = 2;
    std::string solver_type = "midpoint";
    bool lower_order_final = true;
    bool euler_at_final = false;
    std::int64_t original_inference_steps = 50;
    double timestep_scaling = 10.0;
    double shift = 1.0;
    double flow_shift = 1.0;
    bool use_dynamic_shifting = false;
    std::string time_shift_type = "exponential";
    double base_shift = 0.5;
    double max_shift = 1.15;
    std::int64_t base_image_seq_len = 256;
    std::int64_t max_image_seq_len = 4096;
    double shift_terminal = 0.0;
    bool use_exponential_sigmas = false;
    bool use_beta_sigmas = false;
    bool stochastic_sampling = false;
    std::int64_t tokens = 0;  // of a picture; no key of the config: whoever compiles says it

    // Check an object and keep what a sampler reads of it: the keys that say how the network was trained, and those that
    // have `defaults`; throws InputError for a value of the wrong type, outside its range or not supported.
    static SchedulerConfig from_json(const Json &config, const Defaults &defaults, const Only &only);

    // The bound that x0 is clipped to, 0 for none.
    double clip() const { return clip_sample ? clip_sample_range : 0.0; }

    // These throw InputError where the schedule is none, or the steps do not fit in.
    Vector alphas_cumprod() const;  // decreasing; with zero terminal SNR the last is 0
    Vector ratios() const;          // sigma / alpha, finite: zero terminal SNR ends at alphas_cumprod = 2**-24
    Vector spaced_timesteps(std::size_t steps, std::size_t points) const;  // the first `steps` of `points`, descending

  private:
    Vector betas() const;
};

struct Level {
    double alpha, sigma;

    static Level from_alphas_cumprod(double alphas_cumprod);
    static Level from_ratio(double ratio);
    double ratio() const { return sigma / alpha; }  // EDM's sigma
    double log_snr() const;                         // DPM-Solver's lambda; infinite without noise
};

// Where each step is and where it goes: timesteps[i] is what the network is given, here[i] the level then, there[i] the
// level that the step ends at. That is here[i + 1] but where diffusers steps by num_train_timesteps / steps whatever the
// spacing (DDIM, PLMS); `restart` is that stride back up from here[i + 1].
struct Grid {
    Vector timesteps;
    std::vector<Level> here, there, restart;
};

// Noise levels evenly spaced in the seventh root (EDM, 2206.00364, eq. 5).
Vector karras_levels(double first, double last, std::size_t steps);

Grid strided_grid(const SchedulerConfig &config, std::size_t steps);
Grid chained_grid(const SchedulerConfig &config, std::size_t steps);
Grid consistency_grid(const SchedulerConfig &config, std::size_t steps);
Grid interpolated_grid(const SchedulerConfig &config, std::size_t steps);
Grid solver_grid(const SchedulerConfig &config, std::size_t steps);
Grid open_ended_grid(const SchedulerConfig &config, std::size_t steps);

}  // namespace ldm::runtime
