// Samplers that remember: PLMS, Heun, DPM-Solver++, UniPC and DEIS; as ldm_export/plan/multistep.py.
//
// A published update mixes the last few predictions m0 (newest), m1, m2. Here a mixture is its vector of coefficients over
// them, so an update is written as in its paper, acts on unit vectors, and what comes out is the row's weights.
#pragma once

#include "onestep.hpp"

namespace ldm::runtime {

std::vector<Row> plms(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> heun(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> dpm_solver_2m(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> dpm_solver_2m_sde(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> unipc(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);
std::vector<Row> deis(const SchedulerConfig &config, const Grid &grid, std::size_t step, std::size_t age);

}  // namespace ldm::runtime
