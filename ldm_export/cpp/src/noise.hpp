// Gaussian noise equal to torch.randn on a CPU generator; ldm_export/runtime/noise.py has the algorithm in full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>

namespace ldm::runtime {

class Generator {
  public:
    explicit Generator(std::int64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}  // the low 32 bits count

    // Draw N(0, 1) values, as one call of torch.randn does.
    void randn(float *values, std::size_t count);

  private:
    void draw_uniform(float *values, std::size_t count);
    double draw_one();

    std::mt19937 twister_;
    std::optional<double> spare_;
};

}  // namespace ldm::runtime
