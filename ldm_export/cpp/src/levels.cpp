#include "levels.hpp"

#include "error.hpp"
#include "repr.hpp"

#include <algorithm>
#include <map>
#include <set>

namespace ldm::runtime {

namespace {

struct Level {
    double timestep;
    Scales scales;
};

std::vector<Level> levels_of_steps(const Plan &plan, std::size_t start) {
    std::vector<Level> found;
    for (std::size_t step = start; step < plan.num_inference_steps; ++step) {
        const Entry entry = plan.entry(step);
        const Row &first = entry.warmup.empty() ? plan.rows.at(entry.resume) : entry.warmup[0];
        found.push_back({first.timestep, {entry.image_scale, entry.noise_scale}});
    }
    return found;
}

}  // namespace

std::vector<Scales> row_levels(const Plan &plan, std::size_t start) {
    const std::vector<Row> rows = plan.starting_at(start).rows;
    const std::vector<Level> steps = levels_of_steps(plan, start);
    std::vector<Scales> levels;
    const auto same = [](const Row &row, const Level &level) { return row.timestep == level.timestep; };
    if (std::equal(rows.begin(), rows.end(), steps.begin(), steps.end(), same)) {  // a row a step, as most samplers have
        for (const Level &level : steps) levels.push_back(level.scales);
        return levels;
    }
    std::map<double, std::set<Scales>> known;
    for (const Level &level : steps) known[level.timestep].insert(level.scales);
    for (const Row &row : rows) {
        const std::set<Scales> &found = known[row.timestep];
        if (found.size() != 1)
            throw InputError(join("The plan ", plan.sampler, " with ", plan.num_inference_steps, " steps has ",
                                  found.empty() ? "no" : std::to_string(found.size()), " noise levels at timestep ",
                                  brief(row.timestep, 6), "; keeping a part of a picture takes one. Use another sampler, or other "
                                  "steps."));
        levels.push_back(*found.begin());
    }
    return levels;
}

}  // namespace ldm::runtime
