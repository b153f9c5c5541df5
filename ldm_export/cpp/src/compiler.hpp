// Compiles a scheduler config, a sampler's name and a number of steps into a plan; as ldm_export/plan/compiler.py, whose
// docstring says where a plan differs from diffusers.
#pragma once

#include "json.hpp"
#include "plan.hpp"

#include <cstdint>
#include <string>

namespace ldm::runtime {

// The plan of a sampler, or with only some of its network calls, as ddim-calls16 asks; `config` is an object, `tokens` how many
// a picture has, which are read where the config shifts dynamically. Throws InputError for an unknown sampler, a number of
// steps, a scheduler class or a config value that cannot be used, and for a forecast that cannot be made.
Plan compile_plan(const Json &config, const std::string &name, std::int64_t num_inference_steps, std::int64_t tokens = 0);

}  // namespace ldm::runtime
