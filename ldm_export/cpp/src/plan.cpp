#include "plan.hpp"

#include "error.hpp"
#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

namespace ldm::runtime {

namespace {

constexpr std::int64_t FORMAT_VERSION = 1;
constexpr std::size_t MOST_WARMUP_ROWS = 2 * MAX_HISTORY;

[[noreturn]] void refuse(const std::string &what) { throw InputError(what + ". Compile the plan again."); }

// An object of a plan, which must hold exactly these keys.
class Record {
  public:
    Record(const Json &value, const char *where, const std::set<std::string> &names) : value_(value) {
        std::set<std::string> given;
        if (value.is(Kind::object))
            for (const auto &[key, _] : value.object()) given.insert(key);
        if (given != names)
            refuse(join(where, " holds ", value.is(Kind::object) ? listed(given) : value.type(), "; it must hold exactly ",
                        listed(names)));
    }

    double number(const char *name) const { return finite(value_[name], name); }

    std::size_t index(const char *name) const {
        const Json &value = value_[name];
        if (!value.is(Kind::integer) || value.integer() < 0)
            refuse(join("a plan has ", name, " = ", value.dump(), "; it must be a whole number from 0"));
        return static_cast<std::size_t>(value.integer());
    }

    std::string text(const char *name) const {
        const Json &value = value_[name];
        if (!value.is(Kind::text)) refuse(join("a plan has ", name, " = ", value.dump(), "; it must be text"));
        return value.text();
    }

    const Json::Array &list(const char *name) const {
        if (!value_[name].is(Kind::array)) refuse(join("a plan has ", name, " that is no list"));
        return value_[name].array();
    }

    std::vector<double> numbers(const char *name) const {
        std::vector<double> found;
        for (const Json &value : list(name)) found.push_back(finite(value, name));
        return found;
    }

  private:
    static double finite(const Json &value, const char *name) {
        if (!value.is(Kind::number) || !std::isfinite(static_cast<float>(value.number())))
            refuse(join("a plan has ", name, " = ", value.dump(), "; it must be a number that float32 holds"));
        return value.number();
    }

    const Json &value_;
};

Row row_of(const Json &value) {
    static const std::set<std::string> names{"timestep", "input_scale", "from_sample", "from_output", "clip",
                                             "keep",     "direct",      "weights",     "noise"};
    const Record record(value, "a row", names);
    Row row;
    row.timestep = record.number("timestep");
    row.input_scale = record.number("input_scale");
    row.from_sample = record.number("from_sample");
    row.from_output = record.number("from_output");
    row.clip = record.number("clip");
    row.keep = record.number("keep");
    row.direct = record.number("direct");
    row.weights = record.numbers("weights");
    row.noise = record.number("noise");
    if (row.timestep < 0 || !(static_cast<float>(row.input_scale) > 0) || row.clip < 0)
        refuse(join("a plan row has timestep ", row.timestep, ", input_scale ", row.input_scale, " and clip ", row.clip,
                    "; they must be >= 0, > 0 and >= 0"));
    if (row.weights.size() > MAX_HISTORY)
        refuse(join("a plan row has ", row.weights.size(), " weights; at most ", MAX_HISTORY, " values are remembered"));
    return row;
}

std::vector<Row> rows_of(const Json::Array &list) {
    std::vector<Row> rows;
    for (const Json &value : list) rows.push_back(row_of(value));
    return rows;
}

Entry entry_of(const Json &value) {
    const Record record(value, "an entry", {"image_scale", "noise_scale", "warmup", "resume"});
    return {record.number("image_scale"), record.number("noise_scale"), rows_of(record.list("warmup")),
            record.index("resume")};
}

// A run of some warm-up rows, then of a plan's from `resume` on, may weigh only what is remembered by then.
void check(const std::vector<Row> &warmup, const std::vector<Row> &rows, std::size_t resume) {
    const std::size_t count = warmup.size() + rows.size() - resume;
    if (count == 0) refuse("a plan starts with 0 rows; rows must be at least 1");
    for (std::size_t made = 1; made <= std::min(count, MAX_HISTORY); ++made) {
        const Row &row = made <= warmup.size() ? warmup[made - 1] : rows[resume + made - 1 - warmup.size()];
        if (row.weights.size() > made)
            refuse(join("network call ", made, " of a plan weighs ", row.weights.size(), " remembered values; only ", made,
                        " exist by then"));
    }
}

void check(const Plan &plan, const std::vector<Entry> &entries) {
    const std::size_t steps = plan.num_inference_steps, rows = plan.rows.size();
    if (steps > static_cast<std::size_t>(MOST_STEPS)) refuse(join("a plan has ", steps, " steps; it may have ", MOST_STEPS));
    if (steps < 1 || rows < 1 || rows > 2 * steps)
        refuse(join("a plan of ", steps, " steps has ", rows, " rows; a step is at most two network calls"));
    if (entries.size() != steps)
        refuse(join("a plan of ", steps, " steps has ", entries.size(), " entries; it needs one a step"));
    check({}, plan.rows, 0);
    for (std::size_t start = 0; start < steps; ++start) {
        const Entry &entry = entries[start];
        if (entry.resume > rows)
            refuse(join("entry ", start, " of a plan resumes at row ", entry.resume, "; it has rows 0 to ", rows));
        if (entry.warmup.size() > MOST_WARMUP_ROWS)
            refuse(join("entry ", start, " of a plan has ", entry.warmup.size(), " warm-up rows; at most ", MOST_WARMUP_ROWS,
                        " are run"));
        check(entry.warmup, plan.rows, entry.resume);
    }
}

}  // namespace

bool is_float32(double number) { return std::abs(number) <= std::numeric_limits<float>::max(); }  // false for NaN

bool is_sound(const Row &row) {
    const double numbers[] = {row.timestep, row.input_scale, row.from_sample, row.from_output,
                              row.clip,     row.keep,        row.direct,      row.noise};
    return std::all_of(std::begin(numbers), std::end(numbers), is_float32) &&
           std::all_of(row.weights.begin(), row.weights.end(), is_float32) && row.timestep >= 0 &&
           static_cast<float>(row.input_scale) > 0;
}

void check_float32(bool holds, const std::string &sampler, std::size_t steps) {
    if (holds) return;
    throw InputError(join(sampler, " with ", steps, " steps of this scheduler config has numbers that float32 does not hold. "
                          "Use another sampler or number of steps, or the config that the network was trained with."));
}

Trajectory Plan::from_noise() const { return {0.0, init_scale, rows}; }

Trajectory Plan::starting_at(std::size_t step) const {
    Entry found = entry(step);
    Trajectory run{found.image_scale, found.noise_scale, std::move(found.warmup)};
    run.rows.insert(run.rows.end(), rows.begin() + static_cast<std::ptrdiff_t>(found.resume), rows.end());
    return run;
}

std::size_t Plan::first_step(double strength, bool rounds_up) const {
    const auto steps = static_cast<double>(num_inference_steps);
    std::size_t redone = 0;
    if (strength > 0 && strength <= 1)
        redone = rounds_up ? num_inference_steps - static_cast<std::size_t>(steps - steps * strength)
                           : static_cast<std::size_t>(steps * strength);
    if (redone < 1)
        throw InputError(join("strength ", strength, " of ", num_inference_steps, " steps leaves nothing to run; it must ",
                              "lie in [", 1 / steps, ", 1]. Raise the strength or the number of steps."));
    return num_inference_steps - redone;
}

Plan plan_from_json(std::string_view text) {
    Json document;
    try {
        document = parsed(text, Repeats::refused);
    } catch (const MalformedError &error) {
        throw InputError(join("a plan file is ", error.what(), ". Compile the plan again."));
    }
    const Json version = document["format_version"];
    if (!version.is(Kind::integer) || version.integer() != FORMAT_VERSION)
        throw InputError(join("a plan file has format_version ", version.dump(), "; this package reads ", FORMAT_VERSION,
                              ". Compile the plan again with this version."));
    document.object().erase("format_version");
    const bool of_one_size = document.object().count("tokens") != 0;
    std::set<std::string> names{"sampler", "num_inference_steps", "init_scale", "rows", "entries"};
    if (of_one_size) names.insert("tokens");
    const Record record(document, "a plan", names);
    Plan plan;
    plan.sampler = record.text("sampler");
    plan.num_inference_steps = record.index("num_inference_steps");
    plan.init_scale = record.number("init_scale");
    plan.rows = rows_of(record.list("rows"));
    std::vector<Entry> entries;
    for (const Json &value : record.list("entries")) entries.push_back(entry_of(value));
    if (of_one_size) plan.tokens = static_cast<std::int64_t>(record.index("tokens"));
    if (of_one_size && (plan.tokens < 1 || plan.tokens > MOST_TOKENS))
        refuse(join("a plan is of pictures of ", plan.tokens, " tokens; they have 1 to ", MOST_TOKENS));
    check(plan, entries);
    plan.entry = [entries = std::move(entries)](std::size_t step) { return entries.at(step); };
    return plan;
}

Stepper::Stepper(const std::vector<Row> &rows, float *latents, std::size_t count) : latents_(latents), count_(count) {
    std::size_t remembered = 0;
    for (const Row &row : rows) remembered = std::max(remembered, row.weights.size());
    history_.assign(remembered, std::vector<float>(count));
}

void Stepper::network_input(const Row &row, float *out) const {
    const auto scale = static_cast<float>(row.input_scale);
    for (std::size_t i = 0; i < count_; ++i) out[i] = latents_[i] * scale;
}

void Stepper::advance(const Row &row, const float *output, const Draw &draw) {
    if (!history_.empty()) {
        std::rotate(history_.rbegin(), history_.rbegin() + 1, history_.rend());  // the oldest buffer takes the newest value
        float *h = history_.front().data();
        const auto scale = static_cast<float>(row.from_output);
        for (std::size_t i = 0; i < count_; ++i) h[i] = output[i] * scale;
        add(h, row.from_sample, latents_);
        if (row.clip > 0) {
            const auto clip = static_cast<float>(row.clip);
            for (std::size_t i = 0; i < count_; ++i) h[i] = std::clamp(h[i], -clip, clip);
        }
    }
    const auto keep = static_cast<float>(row.keep);
    for (std::size_t i = 0; i < count_; ++i) latents_[i] *= keep;
    add(latents_, row.direct, output);
    for (std::size_t k = 0; k < row.weights.size(); ++k) add(latents_, row.weights[k], history_[k].data());
    if (row.noise != 0) add(latents_, row.noise, draw());
}

// In float32, product and sum rounded each, as numpy does it.
void Stepper::add(float *total, double factor, const float *term) const {
    if (factor == 0) return;
    const auto scale = static_cast<float>(factor);
    for (std::size_t i = 0; i < count_; ++i) total[i] += term[i] * scale;
}

}  // namespace ldm::runtime
