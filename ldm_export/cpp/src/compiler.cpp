#include "compiler.hpp"

#include "error.hpp"
#include "forecast.hpp"
#include "repr.hpp"
#include "samplers.hpp"

#include <algorithm>
#include <cmath>
#include <memory>

namespace ldm::runtime {

namespace {

bool operator==(const Row &a, const Row &b) {
    return a.timestep == b.timestep && a.input_scale == b.input_scale && a.from_sample == b.from_sample &&
           a.from_output == b.from_output && a.clip == b.clip && a.keep == b.keep && a.direct == b.direct &&
           a.weights == b.weights && a.noise == b.noise;
}

bool same(const std::vector<Row> &a, const std::vector<Row> &b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Row &x, const Row &y) { return x == y; });
}

// What the config and the sampler make of each other.
SchedulerConfig options_of(const Json &config, const Sampler &sampler) {
    SchedulerConfig options = SchedulerConfig::from_json(as_trained(config, sampler), sampler.defaults, sampler.only);
    if (options.solver_order > sampler.orders)
        throw InputError(join("the scheduler config has solver_order = ", options.solver_order, "; ", sampler.name,
                              " has orders 1 to ", sampler.orders, ". Lower it."));
    if (sampler.name == "unipc" && !options.lower_order_final &&
        (options.final_sigmas_type == "zero" || options.use_karras_sigmas))
        throw InputError("the scheduler config has lower_order_final = false; unipc's last step is infinite with "
                         "final_sigmas_type 'zero' and empty with use_karras_sigmas. Set lower_order_final to true.");
    const auto &known = sampler.solver_types;
    if (std::find(known.begin(), known.end(), options.solver_type) == known.end()) options.solver_type = known.front();
    return options;
}

class Compiler : public std::enable_shared_from_this<Compiler> {
  public:
    Compiler(const Sampler &sampler, const SchedulerConfig &options, std::size_t steps)
        : sampler_(sampler), options_(options), grid_(sampler.grid(options, steps)) {
        for (std::size_t step = 0; step < steps; ++step) {
            steps_.push_back(rows(step, step));
            firsts_.push_back(firsts_.back() + steps_.back().size());
        }
    }

    // The plan of all calls, whose entries this goes on making.
    Plan plan() const {
        Plan plan;
        plan.sampler = sampler_.name;
        plan.num_inference_steps = steps_.size();
        plan.init_scale = 1;
        plan.tokens = options_.use_dynamic_shifting ? options_.tokens : 0;
        const double first = grid_.here[0].ratio();
        if (sampler_.edm_scale) plan.init_scale = options_.timestep_spacing != "leading" ? first : std::hypot(first, 1);
        check(is_float32(plan.init_scale));
        for (const std::vector<Row> &step : steps_) plan.rows.insert(plan.rows.end(), step.begin(), step.end());
        plan.entry = [self = shared_from_this()](std::size_t step) { return self->entry(step); };
        return plan;
    }

    // What gives the predicted x0 at each row, if rows that remember nothing add noise.
    std::vector<Form> denoised() const {
        const auto is_noisy = [](const Row &row) { return row.noise != 0 && row.weights.empty(); };
        const auto any_noisy = [&](const std::vector<Row> &step) { return std::any_of(step.begin(), step.end(), is_noisy); };
        std::vector<Form> forms;
        if (std::none_of(steps_.begin(), steps_.end(), any_noisy)) return forms;
        for (std::size_t step = 0; step < steps_.size(); ++step)
            for (std::size_t k = 0; k < steps_[step].size(); ++k) {
                const Form form = x0_form(options_, k == 0 ? grid_.here[step] : grid_.there[step]);
                forms.push_back({form.sample * steps_[step][k].input_scale, form.output});
            }
        return forms;
    }

  private:
    std::vector<Row> rows(std::size_t step, std::size_t age) const {
        const std::vector<Row> found = sampler_.rows(options_, grid_, step, std::min(age, MAX_HISTORY));  // older are forgotten
        check(std::all_of(found.begin(), found.end(), is_sound));
        return found;
    }

    // Start at a step with an empty history, until its rows are those of the whole run, as all after them then are.
    Entry entry(std::size_t start) const {
        const Level level = grid_.here.at(start);
        Entry entry{level.alpha, level.sigma, {}, 0};
        if (sampler_.edm_scale) entry = {1.0, level.ratio(), {}, 0};
        check(is_float32(entry.image_scale) && is_float32(entry.noise_scale));
        std::size_t resume = start;
        for (; resume < steps_.size(); ++resume) {
            const std::vector<Row> fresh = rows(resume, resume - start);
            if (same(fresh, steps_[resume])) break;
            entry.warmup.insert(entry.warmup.end(), fresh.begin(), fresh.end());
        }
        entry.resume = firsts_[resume];
        return entry;
    }

    void check(bool holds) const { check_float32(holds, sampler_.name, grid_.timesteps.size()); }

    const Sampler &sampler_;
    const SchedulerConfig options_;
    Grid grid_;
    std::vector<std::vector<Row>> steps_;
    std::vector<std::size_t> firsts_{0};  // the number of the first row of each step, and of one more
};

}  // namespace

Plan compile_plan(const Json &config, const std::string &name, std::int64_t num_inference_steps, std::int64_t tokens) {
    const auto [sampler, calls] = forecast_of(name);
    if (named_of(samplers(), sampler) == nullptr)
        throw InputError(join("sampler ", short_repr(sampler), " is not known; known are ", names_of(samplers()),
                              ". Use one of them."));
    const std::vector<Sampler> &able = samplers_for(config);
    const Sampler *spec = named_of(able, sampler);
    if (spec == nullptr)
        throw InputError(join(sampler, " is for networks trained on the noise of DDPM; this one was trained by flow matching, "
                              "which ", names_of(able), " can sample. Use one of them."));
    SchedulerConfig options = options_of(config, *spec);
    options.tokens = tokens;
    const std::int64_t trained = options.num_train_timesteps, most = std::min(trained, MOST_STEPS);
    if (num_inference_steps < 1 || num_inference_steps > most)
        throw InputError(join("num_inference_steps is ", num_inference_steps, "; it must be 1 to ", most, ", ",
                              most == trained ? "the number of timesteps that the model was trained with"
                                              : "the most that a plan may have",
                              ". Choose one of those."));
    const auto compiler = std::make_shared<const Compiler>(*spec, options, static_cast<std::size_t>(num_inference_steps));
    return calls ? forecast_plan(compiler->plan(), *calls, compiler->denoised()) : compiler->plan();
}

}  // namespace ldm::runtime
