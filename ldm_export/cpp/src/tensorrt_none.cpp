// In place of tensorrt.cpp where this library is built without LDM_TENSORRT.
#include "tensorrt.hpp"

namespace ldm::runtime {

bool may_run_engines(const Bundle &) { return false; }

std::unique_ptr<Engines> open_engines(const Bundle &, const Flavour *flavour) { throw not_built_with(*flavour); }

}  // namespace ldm::runtime
