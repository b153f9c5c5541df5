#include "samplers.hpp"

#include "error.hpp"
#include "multistep.hpp"
#include "repr.hpp"

#include <cmath>
#include <map>
#include <set>

namespace ldm::runtime {

namespace {

template <class Items>
Items both(Items first, const Items &second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

const Defaults LEADING{{"timestep_spacing", "leading"}};
const Defaults LINSPACE{{"timestep_spacing", "linspace"}};
const Defaults CLIP{{"clip_sample", true}, {"clip_sample_range", 1.0}};
const Defaults NO_CLIP{{"clip_sample", false}, {"clip_sample_range", 1.0}};
const Defaults KARRAS{{"use_karras_sigmas", false}};
const Defaults FINAL{{"final_sigmas_type", "zero"}};
const Defaults SOLVER = both(both(LINSPACE, KARRAS), {{"solver_order", std::int64_t{2}}, {"lower_order_final", true}});
const Defaults DPM_SOLVER = both(both(SOLVER, FINAL), {{"solver_type", "midpoint"}, {"euler_at_final", false}});
const Defaults LATENT_BETAS{{"beta_start", 0.00085}, {"beta_end", 0.012}};
const Defaults CONSISTENCY = both(LATENT_BETAS, {{"beta_schedule", "scaled_linear"}});

const Only UNTHRESHOLDED{{"thresholding", {false}}};
const Only NO_OTHER_SIGMAS{{"use_exponential_sigmas", {false}}, {"use_beta_sigmas", {false}}};
const Only SIGMA_BOUNDS{{"sigma_min", {Json()}}, {"sigma_max", {Json()}}};
const Only NO_FLOW = both(both(UNTHRESHOLDED, NO_OTHER_SIGMAS),
                          {{"use_flow_sigmas", {false}}, {"use_dynamic_shifting", {false}}});
const Only DPM_SOLVER_ONLY =
    both(NO_FLOW, {{"use_lu_lambdas", {false}},
                   {"lambda_min_clipped", {-INFINITY}},
                   {"variance_type", {Json(), "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"}}});
const Only EULER_ONLY = both(both(NO_OTHER_SIGMAS, SIGMA_BOUNDS),
                             {{"interpolation_type", {"linear"}}, {"timestep_type", {"discrete"}}});
const Only UNIPC_ONLY = both(both(NO_FLOW, SIGMA_BOUNDS), {{"predict_x0", {true}},
                                                           {"disable_corrector", {Json(Json::Array())}},
                                                           {"solver_p", {Json()}},
                                                           {"shift_terminal", {Json()}}});

const std::vector<Sampler> SAMPLERS{
    {"ddpm", "DDPMScheduler", chained_grid, ddpm, both(both(LEADING, CLIP), {{"variance_type", "fixed_small"}}),
     UNTHRESHOLDED},
    {"ddim", "DDIMScheduler", strided_grid, ddim, both(both(LEADING, CLIP), {{"set_alpha_to_one", true}}), UNTHRESHOLDED},
    {"plms", "PNDMScheduler", strided_grid, plms, both(LEADING, {{"set_alpha_to_one", false}}), {}},
    {"lcm", "LCMScheduler", consistency_grid, lcm,
     both(both(CONSISTENCY, NO_CLIP), {{"original_inference_steps", std::int64_t{50}}, {"timestep_scaling", 10.0}}),
     UNTHRESHOLDED},
    {"euler", "EulerDiscreteScheduler", interpolated_grid, euler, both(both(LINSPACE, KARRAS), FINAL), EULER_ONLY, true},
    {"euler-ancestral", "EulerAncestralDiscreteScheduler", interpolated_grid, euler_ancestral, LINSPACE, {}, true},
    {"heun", "HeunDiscreteScheduler", interpolated_grid, heun,
     both(both(both(LINSPACE, KARRAS), NO_CLIP), LATENT_BETAS), NO_OTHER_SIGMAS, true},
    {"dpmpp-2m", "DPMSolverMultistepScheduler", solver_grid, dpm_solver_2m, DPM_SOLVER, DPM_SOLVER_ONLY, false,
     {"midpoint", "heun"}},
    {"dpmpp-2m-sde", "DPMSolverMultistepScheduler", solver_grid, dpm_solver_2m_sde, DPM_SOLVER, DPM_SOLVER_ONLY, false,
     {"midpoint", "heun"}, 2},
    {"unipc", "UniPCMultistepScheduler", solver_grid, unipc, both(both(SOLVER, FINAL), {{"solver_type", "bh2"}}), UNIPC_ONLY,
     false, {"bh2", "bh1"}},
    {"deis", "DEISMultistepScheduler", open_ended_grid, deis, SOLVER, NO_FLOW},
};

// Classes that step as another one does.
const std::map<std::string, std::string> PARALLEL{{"DDIMParallelScheduler", "DDIMScheduler"},
                                                  {"DDPMParallelScheduler", "DDPMScheduler"}};

// Classes that no sampler here is, of networks that all samplers here can solve; each with its defaults that differ.
const std::map<std::string, Defaults> OF_THE_SAME_KIND{
    {"DPMSolverSDEScheduler", LATENT_BETAS},
    {"DPMSolverSinglestepScheduler", {}},
    {"KDPM2AncestralDiscreteScheduler", LATENT_BETAS},
    {"KDPM2DiscreteScheduler", LATENT_BETAS},
    {"LMSDiscreteScheduler", {}},
    {"SASolverScheduler", {}},
    {"TCDScheduler", CONSISTENCY},
};

// Keys that say how a network was trained and whose defaults differ between classes, with the most usual.
const Defaults NETWORK{{"num_train_timesteps", std::int64_t{1000}},
                       {"beta_start", 0.0001},
                       {"beta_end", 0.02},
                       {"beta_schedule", "linear"}};

// Classes that have the key clip_sample, and classes of `SAMPLERS` that have no key rescale_betas_zero_snr.
const std::set<std::string> CLIPPING{"DDPMScheduler", "DDIMScheduler", "LCMScheduler", "HeunDiscreteScheduler", "TCDScheduler"};
const std::set<std::string> NEVER_ZERO_SNR{"PNDMScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler"};

// The defaults of a class that a config names; none where it is not known.
const Defaults *defaults_of(const std::string &name) {
    if (const auto kin = OF_THE_SAME_KIND.find(name); kin != OF_THE_SAME_KIND.end()) return &kin->second;
    for (const Sampler &sampler : SAMPLERS)
        if (sampler.diffusers_class == name) return &sampler.defaults;
    return nullptr;
}

}  // namespace

const std::vector<Sampler> &samplers() { return SAMPLERS; }

std::string sampler_names() {
    std::vector<std::string> names;
    for (const Sampler &sampler : SAMPLERS) names.push_back(sampler.name);
    return listed(names);
}

Json as_trained(const Json &config, const Sampler &sampler) {
    const Json &name = config["_class_name"];
    if (name.is_null()) return config;
    std::string own = name.is(Kind::text) ? name.text() : "";
    if (const auto other = PARALLEL.find(own); other != PARALLEL.end()) own = other->second;
    const Defaults *defaults = defaults_of(own);
    if (defaults == nullptr)
        throw InputError(join("the scheduler is ", short_repr(name), "; a network with that scheduler cannot be sampled by ",
                              sampler_names(), ", which are for networks trained on the noise of DDPM. Use another checkpoint."));
    Json trained = config;
    Json::Object &values = trained.object();
    for (const auto &[key, usual] : NETWORK) {
        if (!config[key].is_null()) continue;
        values[key] = usual;
        for (const auto &[its_key, value] : *defaults)
            if (its_key == key) values[key] = value;
    }
    if (CLIPPING.count(own) == 0 && config["clip_sample"].is_null()) values["clip_sample"] = false;
    if (own == sampler.diffusers_class && NEVER_ZERO_SNR.count(own) != 0) values.erase("rescale_betas_zero_snr");
    return trained;
}

}  // namespace ldm::runtime
