#include "forecast.hpp"

#include "arrays.hpp"
#include "error.hpp"
#include "repr.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <valarray>

namespace ldm::runtime {

namespace {

using Mask = std::vector<bool>;  // which rows call the network

constexpr std::size_t ORDER = 1;        // degree of the polynomial
constexpr std::size_t MOST_DIGITS = 7;  // of a number of calls
constexpr std::size_t MOST_LEAD = 3;    // calls that are made without a gap at the start
constexpr double LARGEST_CONDITION = 1e3;

// Coordinates over x at the last call, the output there, and what this call and those before it remember.
using Linear = std::valarray<double>;
constexpr std::size_t X = 0, OUTPUT = 1, REMEMBERED = 2, COORDINATES = REMEMBERED + MAX_HISTORY + ORDER;

Linear unit(std::size_t axis) {
    Linear found(COORDINATES);
    found[axis] = 1;
    return found;
}

// Folds rows, one after the other, into one a call. Throws InputError if a row would need what the table does not remember, or
// a forecast is too far.
class Folder {
  public:
    explicit Folder(const Plan &plan) : plan_(plan) {}

    // A row that calls the network, of which `form` is extrapolated later.
    void call(const Row &row, const Form &form) {
        ++calls_;
        for (Linear &value : remembered_) value = value.shift(-1);
        const auto same = [&](const Known &known) { return known.timestep == row.timestep; };
        known_.erase(std::remove_if(known_.begin(), known_.end(), same), known_.end());
        known_.push_back({row.timestep, calls_});
        if (known_.size() > ORDER + 1) known_.erase(known_.begin());
        called_ = row;
        called_.from_sample = form.sample;
        called_.from_output = form.output;
        x_ = unit(X);
        noises_.clear();
        advance(row, unit(REMEMBERED), unit(OUTPUT));
    }

    void skip(const Row &row, const Form &form) {
        const Linear value = extrapolated(row.timestep);
        for (double &noise : noises_) noise = row.keep * noise + row.direct * ((0 - form.sample * noise) / form.output);
        advance(row, value, (value - form.sample * x_) / form.output);
    }

    // The row of the last call, after which x is where it is now.
    Row folded() const {
        Row row = called_;
        row.keep = x_[X];
        row.direct = x_[OUTPUT];
        row.weights.assign(std::begin(x_) + REMEMBERED, std::end(x_));
        while (!row.weights.empty() && row.weights.back() == 0) row.weights.pop_back();
        if (row.weights.size() > MAX_HISTORY)
            throw InputError(join("call ", calls_, " of this forecast needs what was remembered ", row.weights.size() - 1,
                                  " calls before; a row remembers ", MAX_HISTORY - 1,
                                  ". Lower the order, make more calls, or use a sampler that remembers less."));
        row.noise = 0;
        for (const double noise : noises_) row.noise = std::hypot(row.noise, noise);
        check(is_sound(row));
        return row;
    }

  private:
    struct Known {
        double timestep;
        std::size_t call;
    };

    void advance(const Row &row, const Linear &value, const Linear &output) {
        remembered_.insert(remembered_.begin(), value);
        if (remembered_.size() > MAX_HISTORY) remembered_.pop_back();
        x_ = row.keep * x_ + row.direct * output;
        for (std::size_t k = 0; k < std::min(row.weights.size(), remembered_.size()); ++k)
            x_ += row.weights[k] * remembered_[k];
        noises_.push_back(row.noise);
        const auto finite = [](double number) { return std::isfinite(number); };
        check(std::all_of(std::begin(x_), std::end(x_), finite) && std::all_of(noises_.begin(), noises_.end(), finite));
    }

    // The polynomial through the newest known values at a timestep.
    Linear extrapolated(double timestep) const {
        Linear value(COORDINATES);
        double condition = 0;
        for (const Known &known : known_) {
            double share = 1;
            for (const Known &other : known_)
                if (other.call != known.call) share *= (timestep - other.timestep) / (known.timestep - other.timestep);
            condition += std::abs(share);
            value[REMEMBERED + calls_ - known.call] = share;
        }
        if (condition <= LARGEST_CONDITION) return value;
        std::vector<std::string> from;
        for (const Known &known : known_) from.push_back(brief(known.timestep, 6));
        throw InputError(join("a forecast of order ", ORDER, " at timestep ", brief(timestep, 6), " from ", listed(from),
                              " has condition number ", brief(condition, 2), "; at most ", LARGEST_CONDITION,
                              " is allowed. Lower the order, or make more calls."));
    }

    void check(bool holds) const { check_float32(holds, plan_.sampler, plan_.num_inference_steps); }

    const Plan &plan_;
    Row called_;
    Linear x_ = unit(X);
    Vector noises_;                   // of each row since the last call, as x has them
    std::vector<Linear> remembered_;  // by the rows before they are folded, the newest first
    std::vector<Known> known_;        // of which the polynomials are, the newest last
    std::size_t calls_ = 0;
};

// Rows of one call each that do what `rows`, the last of a plan, do when only the calls `made` are, of which the first is one.
std::vector<Row> fold(const Plan &plan, const std::vector<Row> &rows, const std::vector<Form> &denoised, const Mask &made) {
    std::vector<Row> found;
    Folder folder(plan);
    for (std::size_t k = 0; k < rows.size(); ++k) {
        const Row &row = rows[k];
        const std::size_t left = rows.size() - k;
        Form form{0.0, 1.0};
        if (!row.weights.empty()) form = {row.from_sample, row.from_output};
        else if (!denoised.empty()) form = denoised[denoised.size() - left];
        made[k] ? folder.call(row, form) : folder.skip(row, form);
        if (left == 1 || made[k + 1]) found.push_back(folder.folded());
    }
    return found;
}

// The first third of `calls`, at most MOST_LEAD, the last, and evenly between.
Mask spaced_calls(std::size_t rows, std::size_t calls) {
    const std::size_t first = std::clamp<std::size_t>(calls / 3, 1, MOST_LEAD);
    Mask made(rows);
    std::fill_n(made.begin(), first, true);
    const auto at = [](std::size_t number) { return static_cast<double>(number); };
    for (const double number : linspace(at(first - 1), at(rows - 1), calls - first + 1))
        made[static_cast<std::size_t>(std::nearbyint(number))] = true;  // halves to even, as Python rounds
    return made;
}

// Whether two rows do the same, but for the rounding of how they came about.
bool are_alike(const Row &a, const Row &b) {
    const auto near = [](double ours, double theirs) { return std::abs(ours - theirs) <= 1e-12 + 1e-9 * std::abs(theirs); };
    return near(a.timestep, b.timestep) && near(a.input_scale, b.input_scale) && near(a.from_sample, b.from_sample) &&
           near(a.from_output, b.from_output) && near(a.clip, b.clip) && near(a.keep, b.keep) && near(a.direct, b.direct) &&
           near(a.noise, b.noise) && std::equal(a.weights.begin(), a.weights.end(), b.weights.begin(), b.weights.end(), near);
}

// How an entry of the whole plan is entered where only the calls `made` are, which folded into `folded`.
Entry entry_of(const Plan &whole, std::size_t step, const std::vector<Form> &denoised, const Mask &made,
               const std::vector<Row> &folded) {
    const Trajectory run = whole.starting_at(step);
    const std::size_t rows = run.rows.size(), count = std::min(rows, made.size());  // a solver may do its first step twice
    const auto lead = static_cast<std::size_t>(std::find(made.begin(), made.end(), false) - made.begin());
    Mask own(rows);
    std::copy(made.end() - static_cast<std::ptrdiff_t>(count), made.end(), own.end() - static_cast<std::ptrdiff_t>(count));
    std::fill_n(own.begin(), std::min({lead, rows, MOST_LEAD}), true);
    Entry entry{run.image_scale, run.noise_scale, fold(whole, run.rows, denoised, own), folded.size()};
    while (!entry.warmup.empty() && entry.resume > 0 && are_alike(entry.warmup.back(), folded[entry.resume - 1])) {
        entry.warmup.pop_back();
        --entry.resume;
    }
    return entry;
}

}  // namespace

std::pair<std::string, std::optional<std::size_t>> forecast_of(const std::string &name) {
    const std::size_t mark = name.rfind(CALLS);
    if (mark == std::string::npos || mark == 0) return {name, std::nullopt};
    const std::string calls = name.substr(mark + std::strlen(CALLS));
    if (calls.empty() || calls.size() > MOST_DIGITS || calls.find_first_not_of("0123456789") != std::string::npos)
        return {name, std::nullopt};
    return {name.substr(0, mark), std::stoul(calls)};
}

Plan forecast_plan(const Plan &whole, std::size_t calls, const std::vector<Form> &denoised) {
    const std::size_t rows = whole.rows.size();
    if (calls < 1 || calls > rows)
        throw InputError(join("calls is ", calls, "; the plan makes ", rows, ", of which 1 to ", rows,
                              " can be kept. Choose one of those."));
    if (calls == rows) return whole;
    const Mask made = spaced_calls(rows, calls);
    Plan plan = whole;
    plan.sampler += join(CALLS, calls);
    plan.rows = fold(whole, whole.rows, denoised, made);
    plan.entry = [whole, denoised, made, folded = plan.rows](std::size_t step) {
        return entry_of(whole, step, denoised, made, folded);
    };
    return plan;
}

}  // namespace ldm::runtime
