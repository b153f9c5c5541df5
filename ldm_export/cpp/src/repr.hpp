// JSON values in messages as Python writes them, so that both runtimes say the same of a scheduler config.
#pragma once

#include "json.hpp"

#include <string>

namespace ldm::runtime {

// A value as Python's repr, such as 'euler', 0.5, True or [None], cut after 60 characters.
std::string short_repr(const Json &value);

// A number with so many digits, as Python's format .3g.
std::string brief(double number, int digits = 3);

}  // namespace ldm::runtime
