// Samplers by name, and the scheduler classes of diffusers that their configs are of; as ldm_export/plan/samplers.py.
#pragma once

#include "onestep.hpp"

#include <string>
#include <vector>

namespace ldm::runtime {

// How one sampler is compiled. `defaults` are the keys of the config that it reads besides those of every sampler, with the
// defaults of `diffusers_class`; `only` those with the values that it supports. `solver_types` are the words it knows for
// one of them, any other meaning the first, and `orders` is how many solver orders it has. `edm_scale` says that its latents
// are x0 + ratio * eps instead of alpha * x0 + sigma * eps.
struct Sampler {
    std::string name, diffusers_class;
    Grid (*grid)(const SchedulerConfig &config, std::size_t steps);
    Rows rows;
    Defaults defaults;
    Only only;
    bool edm_scale = false;
    std::vector<std::string> solver_types{"midpoint"};
    std::int64_t orders = 3;
};

// Samplers of networks trained on the noise of DDPM, and those that can sample a network of this config; that throws
// InputError for a config that contradicts itself about flow matching.
const std::vector<Sampler> &samplers();
const std::vector<Sampler> &samplers_for(const Json &config);
const Sampler *named_of(const std::vector<Sampler> &samplers, const std::string &name);  // null where there is none
std::string names_of(const std::vector<Sampler> &samplers);                              // with a comma between them

// The config with what its own class fills in of how the network was trained, for any sampler to read; throws InputError for
// a class whose networks no sampler here can solve.
Json as_trained(const Json &config, const Sampler &sampler);

}  // namespace ldm::runtime
