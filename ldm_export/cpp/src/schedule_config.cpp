// The keys of a scheduler config, each checked.
#include "error.hpp"
#include "repr.hpp"
#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <variant>

namespace ldm::runtime {

namespace {

constexpr std::int64_t MOST_TIMESTEPS = 100'000;

using Member = std::variant<std::int64_t SchedulerConfig::*, double SchedulerConfig::*, bool SchedulerConfig::*,
                            std::string SchedulerConfig::*, Vector SchedulerConfig::*>;
struct Field {
    const char *name;
    Member member;
    bool shared = false;  // every sampler reads it: it describes how the network was trained
};

const Field FIELDS[] = {
    {"num_train_timesteps", &SchedulerConfig::num_train_timesteps, true},
    {"beta_start", &SchedulerConfig::beta_start, true},
    {"beta_end", &SchedulerConfig::beta_end, true},
    {"beta_schedule", &SchedulerConfig::beta_schedule, true},
    {"trained_betas", &SchedulerConfig::trained_betas, true},
    {"prediction_type", &SchedulerConfig::prediction_type, true},
    {"timestep_spacing", &SchedulerConfig::timestep_spacing, true},
    {"steps_offset", &SchedulerConfig::steps_offset, true},
    {"rescale_betas_zero_snr", &SchedulerConfig::rescale_betas_zero_snr, true},
    {"set_alpha_to_one", &SchedulerConfig::set_alpha_to_one},
    {"clip_sample", &SchedulerConfig::clip_sample},
    {"clip_sample_range", &SchedulerConfig::clip_sample_range},
    {"variance_type", &SchedulerConfig::variance_type},
    {"use_karras_sigmas", &SchedulerConfig::use_karras_sigmas},
    {"final_sigmas_type", &SchedulerConfig::final_sigmas_type},
    {"solver_order", &SchedulerConfig::solver_order},
    {"solver_type", &SchedulerConfig::solver_type},
    {"lower_order_final", &SchedulerConfig::lower_order_final},
    {"euler_at_final", &SchedulerConfig::euler_at_final},
    {"original_inference_steps", &SchedulerConfig::original_inference_steps},
    {"timestep_scaling", &SchedulerConfig::timestep_scaling},
    {"shift", &SchedulerConfig::shift},
    {"flow_shift", &SchedulerConfig::flow_shift},
    {"use_dynamic_shifting", &SchedulerConfig::use_dynamic_shifting},
    {"time_shift_type", &SchedulerConfig::time_shift_type},
    {"base_shift", &SchedulerConfig::base_shift},
    {"max_shift", &SchedulerConfig::max_shift},
    {"base_image_seq_len", &SchedulerConfig::base_image_seq_len},
    {"max_image_seq_len", &SchedulerConfig::max_image_seq_len},
    {"shift_terminal", &SchedulerConfig::shift_terminal},
    {"use_exponential_sigmas", &SchedulerConfig::use_exponential_sigmas},
    {"use_beta_sigmas", &SchedulerConfig::use_beta_sigmas},
    {"stochastic_sampling", &SchedulerConfig::stochastic_sampling},
};

// What a word of the config may be.
const std::map<std::string, std::vector<std::string>> CHOICES{
    {"beta_schedule", {"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"}},
    {"prediction_type", {"epsilon", "v_prediction", "sample"}},
    {"timestep_spacing", {"leading", "trailing", "linspace"}},
    {"variance_type", {"fixed_small", "fixed_small_log", "fixed_large"}},
    {"final_sigmas_type", {"zero", "sigma_min"}},
    {"solver_type", {"midpoint", "heun", "bh1", "bh2", "logrho"}},
    {"time_shift_type", {"exponential", "linear"}},
};

[[noreturn]] void refuse(const std::string &key, const Json &value, const std::string &allowed) {
    const bool shared = std::any_of(std::begin(FIELDS), std::end(FIELDS),
                                    [&](const Field &field) { return field.name == key && field.shared; });
    throw InputError(join("the scheduler config has ", key, " = ", short_repr(value), "; ", allowed, ". ",
                          shared ? "Use the config that the network was trained with." : "Choose another sampler."));
}

// Whether Python takes two values for equal, for which true is 1.
bool equal(const Json &a, const Json &b) {
    const auto counts = [](const Json &value) { return value.is(Kind::number) || value.is(Kind::boolean); };
    const auto number = [](const Json &value) { return value.is(Kind::boolean) ? value.boolean() : value.number(); };
    if (counts(a) && counts(b)) return number(a) == number(b);
    if (a.is(Kind::text) && b.is(Kind::text)) return a.text() == b.text();
    if (a.is(Kind::array) && b.is(Kind::array))
        return std::equal(a.array().begin(), a.array().end(), b.array().begin(), b.array().end(), equal);
    return a.is_null() && b.is_null();
}

bool is_truth(const Json &value) { return equal(value, true) || equal(value, false); }

// Refuse a value unless it is one that the key may have.
void check(const Field &field, const Json &value) {
    const std::string key = field.name;
    if (const auto choices = CHOICES.find(key); choices != CHOICES.end()) {
        const auto &words = choices->second;
        if (!value.is(Kind::text) || std::find(words.begin(), words.end(), value.text()) == words.end())
            refuse(key, value, "it must be one of " + listed(words));
    }
    const bool whole = value.is(Kind::integer), number = value.is(Kind::number);
    if (std::holds_alternative<bool SchedulerConfig::*>(field.member) && !is_truth(value))
        refuse(key, value, "it must be true or false");
    if (std::holds_alternative<std::int64_t SchedulerConfig::*>(field.member) &&
        !(whole && value.integer() >= (key != "steps_offset" ? 1 : 0)))
        refuse(key, value, "it must be a positive integer");
    if (std::holds_alternative<double SchedulerConfig::*>(field.member) &&
        !(number && value.number() > 0 && std::isfinite(value.number())))
        refuse(key, value, "it must be a positive number");
    const auto decimal = [](const Json &item) { return item.is(Kind::number) && !item.is(Kind::integer); };
    if (std::holds_alternative<Vector SchedulerConfig::*>(field.member) &&
        !(value.is(Kind::array) && std::all_of(value.array().begin(), value.array().end(), decimal)))
        refuse(key, value, "it must be a list of decimal numbers");
}

struct Setter {
    SchedulerConfig &config;
    const Json &value;

    void operator()(std::int64_t SchedulerConfig::*member) const { config.*member = value.integer(); }
    void operator()(double SchedulerConfig::*member) const { config.*member = value.number(); }
    void operator()(bool SchedulerConfig::*member) const { config.*member = equal(value, true); }
    void operator()(std::string SchedulerConfig::*member) const { config.*member = value.text(); }
    void operator()(Vector SchedulerConfig::*member) const {
        for (const Json &item : value.array()) (config.*member).push_back(item.number());
    }
};

}  // namespace

SchedulerConfig SchedulerConfig::from_json(const Json &config, const Defaults &defaults, const Only &only) {
    for (const auto &[key, allowed] : only) {
        const Json &value = config[key];
        const auto same = [&value = value](const Json &other) { return equal(value, other); };
        if (value.is_null() || std::any_of(allowed.begin(), allowed.end(), same)) continue;
        std::string words;
        for (const Json &word : allowed) words += (words.empty() ? "" : " and ") + short_repr(word);
        refuse(key, value, "only " + words + " is supported");
    }
    SchedulerConfig taken;
    for (const Field &field : FIELDS) {
        const auto own = std::find_if(defaults.begin(), defaults.end(),
                                      [&](const auto &item) { return item.first == field.name; });
        const Json &given = config[field.name];
        if (!given.is_null() && (field.shared || own != defaults.end())) {
            check(field, given);
            std::visit(Setter{taken, given}, field.member);
        } else if (own != defaults.end()) {
            std::visit(Setter{taken, own->second}, field.member);
        }
    }
    if (taken.num_train_timesteps > MOST_TIMESTEPS)
        refuse("num_train_timesteps", taken.num_train_timesteps, "at most 100,000 are supported");
    return taken;
}

}  // namespace ldm::runtime
