// How much memory there is, so that what cannot be held is refused before it is asked for.
#pragma once

#include <cstdint>

namespace ldm::runtime {

// Bytes that this process may still take: of the machine, of its control group, and of its address space. The largest
// number where none of these can be read.
std::uint64_t available_bytes();

}  // namespace ldm::runtime
