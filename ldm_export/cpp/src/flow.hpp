// Flow matching: noise levels and solvers of networks that predict the velocity from data to noise; as ldm_export/plan/flow.py,
// whose docstring has the formulas.
#pragma once

#include "onestep.hpp"

namespace ldm::runtime {

// What prediction_type says of such networks.
inline constexpr const char *FLOW_PREDICTION = "flow_prediction";

// Noise levels of FlowMatchEuler and FlowMatchHeun, of DPM-Solver++ and of UniPC with use_flow_sigmas. They throw InputError
// where levels are by the number of a picture's tokens and there are none.
Grid flow_euler_grid(const SchedulerConfig &config, std::size_t steps);
Grid flow_solver_grid(const SchedulerConfig &config, std::size_t steps);
Grid flow_unipc_grid(const SchedulerConfig &config, std::size_t steps);

std::vector<Row> flow_euler(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> flow_heun(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);

}  // namespace ldm::runtime
