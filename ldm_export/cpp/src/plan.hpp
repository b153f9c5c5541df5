// The sampling plan: a sampler as a table, its file, and the loop that runs it; as ldm_export/plan/table.py.
//
//   h_0  = from_sample * x + from_output * out                      then clipped to +-clip where clip > 0
//   x   <- keep * x + direct * out + sum_k weights[k] * h_k + noise * z         z ~ N(0, I)
//   network input = input_scale * x,   timestep = the row's timestep
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace ldm::runtime {

constexpr std::int64_t MOST_STEPS = 10'000;
constexpr std::size_t MAX_HISTORY = 5;  // values that a row may remember
constexpr std::int64_t MOST_TOKENS = std::int64_t{1} << 40;  // of the largest picture, one a pixel

// One network call and the update that follows it.
struct Row {
    double timestep = 0;
    double input_scale = 1;
    double from_sample = 0;
    double from_output = 0;
    double clip = 0;
    double keep = 0;
    double direct = 0;
    std::vector<double> weights;  // newest first, at most MAX_HISTORY
    double noise = 0;
};

bool is_float32(double number);  // whether it is finite once it is a float32, which latents are
bool is_sound(const Row &row);   // whether all its numbers are, and in their ranges

// Throws InputError for what a sampler's formulas gave, unless it is sound.
void check_float32(bool holds, const std::string &sampler, std::size_t steps);

// A run of the sampler: x = image_scale * image_latents + noise_scale * z, then the rows in order.
struct Trajectory {
    double image_scale = 0;
    double noise_scale = 0;
    std::vector<Row> rows;
};

// How image-to-image enters the plan at one of its steps: its warm-up rows, then the plan's own from `resume` on.
struct Entry {
    double image_scale = 0;
    double noise_scale = 0;
    std::vector<Row> warmup;
    std::size_t resume = 0;
};

// There are as many rows as network calls: one or two a step, and fewer where outputs are forecast. Each entry is made when it
// is asked for, which may throw InputError: most runs start from noise.
struct Plan {
    std::string sampler;
    std::size_t num_inference_steps = 0;
    double init_scale = 0;
    std::vector<Row> rows;
    std::function<Entry(std::size_t step)> entry;
    std::int64_t tokens = 0;  // of the pictures that it draws; 0 for any size

    Trajectory from_noise() const;
    Trajectory starting_at(std::size_t step) const;
    // The step from which the last `strength` of the steps, in (0, 1], is redone; throws InputError where that leaves none.
    std::size_t first_step(double strength, bool rounds_up = false) const;
};

// Read a plan file, checking everything; throws InputError.
Plan plan_from_json(std::string_view text);

// Runs rows on latents, in place.
class Stepper {
  public:
    using Draw = std::function<const float *()>;  // N(0, I), as many values as the latents

    Stepper(const std::vector<Row> &rows, float *latents, std::size_t count);

    void network_input(const Row &row, float *out) const;
    // Take the network's (guided) output; `draw` is called once where the row adds noise, else not at all.
    void advance(const Row &row, const float *output, const Draw &draw);

  private:
    void add(float *total, double factor, const float *term) const;

    float *latents_;
    std::size_t count_;
    std::vector<std::vector<float>> history_;  // newest first
};

}  // namespace ldm::runtime
