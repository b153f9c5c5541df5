#include "memory.hpp"

#include <algorithm>
#include <fstream>
#include <string>

#include <sys/resource.h>

namespace ldm::runtime {

namespace {

constexpr std::uint64_t UNKNOWN = UINT64_MAX;

// The number after a word in a file such as /proc/meminfo, in kB; UNKNOWN if there is none.
std::uint64_t kilobytes(const char *file, const std::string &word) {
    std::ifstream stream(file);
    for (std::string found; stream >> found;)
        if (std::uint64_t number = 0; found == word && stream >> number) return number;
    return UNKNOWN;
}

// What is left below a limit.
std::uint64_t rest(std::uint64_t limit, std::uint64_t used) { return limit > used ? limit - used : 0; }

std::uint64_t of_machine() {
    const std::uint64_t available = kilobytes("/proc/meminfo", "MemAvailable:"), swap = kilobytes("/proc/meminfo", "SwapFree:");
    return available == UNKNOWN ? UNKNOWN : 1024 * (available + (swap == UNKNOWN ? 0 : swap));
}

// Of the control group that a container runs in, version 2.
std::uint64_t of_group() {
    std::uint64_t limit = 0, used = 0;
    std::ifstream most("/sys/fs/cgroup/memory.max"), now("/sys/fs/cgroup/memory.current");
    return most >> limit && now >> used ? rest(limit, used) : UNKNOWN;
}

std::uint64_t of_address_space() {
    struct rlimit limit {};
    if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return UNKNOWN;
    const std::uint64_t used = kilobytes("/proc/self/status", "VmSize:");
    return rest(limit.rlim_cur, used == UNKNOWN ? 0 : 1024 * used);
}

}  // namespace

std::uint64_t available_bytes() { return std::min({of_machine(), of_group(), of_address_space()}); }

}  // namespace ldm::runtime
