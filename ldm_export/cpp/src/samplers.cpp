#include "samplers.hpp"

#include "error.hpp"
#include "flow.hpp"
#include "multistep.hpp"
#include "repr.hpp"

#include <algorithm>
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

const Defaults FLOW{{"prediction_type", FLOW_PREDICTION}};
const Defaults SHIFTING{{"use_dynamic_shifting", false},          {"time_shift_type", "exponential"}, {"base_shift", 0.5},
                        {"max_shift", 1.15},                      {"base_image_seq_len", std::int64_t{256}},
                        {"max_image_seq_len", std::int64_t{4096}}};
const Defaults FLOW_SOLVER = both(both(FLOW, SHIFTING), {{"solver_order", std::int64_t{2}},
                                                         {"lower_order_final", true},
                                                         {"flow_shift", 1.0}});
const Defaults FLOW_DPM_SOLVER = both(FLOW_SOLVER, {{"solver_type", "midpoint"}, {"euler_at_final", false}});
const Only NOT_INVERTED{{"invert_sigmas", {false}}};
const Only FLOW_HEUN_ONLY = both(both(NOT_INVERTED, NO_OTHER_SIGMAS), {{"use_dynamic_shifting", {false}},
                                                                       {"use_karras_sigmas", {false}},
                                                                       {"shift_terminal", {Json()}}});
const Only FLOW_SOLVER_ONLY = both(both(both(NOT_INVERTED, UNTHRESHOLDED), NO_OTHER_SIGMAS),
                                   {{"use_karras_sigmas", {false}}, {"final_sigmas_type", {"zero"}}});
const Only FLOW_DPM_SOLVER_ONLY = both(FLOW_SOLVER_ONLY, {{"use_lu_lambdas", {false}}, {"time_shift_type", {"exponential"}},
                                                           {"shift_terminal", {Json()}}});
const Only FLOW_UNIPC_ONLY = both(both(FLOW_SOLVER_ONLY, SIGMA_BOUNDS), {{"predict_x0", {true}},
                                                                        {"disable_corrector", {Json(Json::Array())}},
                                                                        {"solver_p", {Json()}}});

// Samplers of networks trained by flow matching, of the same names where they are the same method.
const std::vector<Sampler> FLOW_SAMPLERS{
    {"euler", "FlowMatchEulerDiscreteScheduler", flow_euler_grid, flow_euler,
     both(both(FLOW, SHIFTING), {{"shift", 1.0}, {"shift_terminal", 0.0}, {"stochastic_sampling", false},
                                 {"use_karras_sigmas", false}, {"use_exponential_sigmas", false}, {"use_beta_sigmas", false}}),
     NOT_INVERTED},
    {"heun", "FlowMatchHeunDiscreteScheduler", flow_euler_grid, flow_heun, both(FLOW, {{"shift", 1.0}}), FLOW_HEUN_ONLY},
    {"dpmpp-2m", "DPMSolverMultistepScheduler", flow_solver_grid, dpm_solver_2m, FLOW_DPM_SOLVER, FLOW_DPM_SOLVER_ONLY, false,
     {"midpoint", "heun"}},
    {"dpmpp-2m-sde", "DPMSolverMultistepScheduler", flow_solver_grid, dpm_solver_2m_sde, FLOW_DPM_SOLVER,
     FLOW_DPM_SOLVER_ONLY, false, {"midpoint", "heun"}, 2},
    {"unipc", "UniPCMultistepScheduler", flow_unipc_grid, unipc,
     both(FLOW_SOLVER, {{"solver_type", "bh2"}, {"shift_terminal", 0.0}}), FLOW_UNIPC_ONLY, false, {"bh2", "bh1"}},
};

// Classes for flow matching alone, and classes that have the key use_flow_sigmas.
const std::set<std::string> FLOW_MATCHING{"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"};
const std::set<std::string> READ_FLOW_SIGMAS{"DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                                             "DEISMultistepScheduler"};

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
    for (const Sampler &sampler : FLOW_SAMPLERS)
        if (sampler.diffusers_class == name) return &sampler.defaults;
    return nullptr;
}

// Whether Python takes a value for true.
bool truth(const Json &value) {
    if (value.is_null()) return false;
    if (value.is(Kind::boolean)) return value.boolean();
    if (value.is(Kind::number)) return value.number() != 0;
    if (value.is(Kind::text)) return !value.text().empty();
    return value.is(Kind::array) ? !value.array().empty() : !value.object().empty();
}

// Whether a config is of a network trained by flow matching; throws InputError if it says so of the noise levels and not of
// what the network predicts, or the other way round.
bool is_flow(const Json &config) {
    const Json &name = config["_class_name"], &predicts = config["prediction_type"], &sigmas = config["use_flow_sigmas"];
    const bool named = name.is(Kind::text);
    if (named && FLOW_MATCHING.count(name.text()) != 0) return true;
    const bool levels = (!named || READ_FLOW_SIGMAS.count(name.text()) != 0) && truth(sigmas);
    if (levels != (predicts.is(Kind::text) && predicts.text() == FLOW_PREDICTION))
        throw InputError(join("the scheduler config has use_flow_sigmas = ", short_repr(sigmas), " and prediction_type = ",
                              short_repr(predicts), "; a network trained by flow matching has true and '", FLOW_PREDICTION,
                              "', any other neither. Use the config that the network was trained with."));
    return levels;
}

// The config of a network trained by flow matching with its shift under the names of every class.
Json as_flow(Json config) {
    Json::Object &values = config.object();
    for (const char *key : {"prediction_type", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"})
        values.erase(key);
    for (const auto &[key, other] : {std::pair("shift", "flow_shift"), std::pair("flow_shift", "shift")})
        if (config[key].is_null() && !config[other].is_null()) values[key] = Json(config[other]);
    if (!truth(config["shift_terminal"])) values.erase("shift_terminal");
    return config;
}

}  // namespace

const std::vector<Sampler> &samplers() { return SAMPLERS; }
const std::vector<Sampler> &samplers_for(const Json &config) { return is_flow(config) ? FLOW_SAMPLERS : SAMPLERS; }

const Sampler *named_of(const std::vector<Sampler> &samplers, const std::string &name) {
    const auto same = [&](const Sampler &sampler) { return sampler.name == name; };
    const auto found = std::find_if(samplers.begin(), samplers.end(), same);
    return found == samplers.end() ? nullptr : &*found;
}

std::string names_of(const std::vector<Sampler> &samplers) {
    std::vector<std::string> names;
    for (const Sampler &sampler : samplers) names.push_back(sampler.name);
    return listed(names);
}

Json as_trained(const Json &config, const Sampler &sampler) {
    const Json &name = config["_class_name"];
    if (name.is_null()) return is_flow(config) ? as_flow(config) : config;
    std::string own = name.is(Kind::text) ? name.text() : "";
    if (const auto other = PARALLEL.find(own); other != PARALLEL.end()) own = other->second;
    const Defaults *defaults = defaults_of(own);
    if (defaults == nullptr)
        throw InputError(join("the scheduler is ", short_repr(name), "; a network with that scheduler cannot be sampled by ",
                              names_of(SAMPLERS), ", which are for networks trained on the noise of DDPM or by flow "
                              "matching. Use another checkpoint."));
    if (is_flow(config)) return as_flow(config);
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
