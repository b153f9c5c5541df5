#include "noise.hpp"

#include <cmath>

namespace ldm::runtime {

namespace {

constexpr std::size_t BLOCK = 16;
constexpr double TWO_PI = 6.283185307179586476925;

// Uniforms in [0, 1) to normal values in place, a block of 16 (Box & Muller 1958).
void box_muller(float *block) {
    for (std::size_t j = 0; j < BLOCK / 2; ++j) {
        const double radius = std::sqrt(-2 * std::log(static_cast<double>(1.0f - block[j])));
        const double angle = static_cast<float>(TWO_PI) * block[j + BLOCK / 2];  // a float32 product
        block[j] = static_cast<float>(radius * std::cos(angle));
        block[j + BLOCK / 2] = static_cast<float>(radius * std::sin(angle));
    }
}

}  // namespace

void Generator::randn(float *values, std::size_t count) {
    if (count < BLOCK) {
        for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(draw_one());
        return;
    }
    draw_uniform(values, count);
    for (std::size_t start = 0; start + BLOCK <= count; start += BLOCK) box_muller(values + start);
    if (count % BLOCK != 0) {  // the last 16 values are drawn anew
        float *last = values + (count - BLOCK);
        draw_uniform(last, BLOCK);
        box_muller(last);
    }
}

void Generator::draw_uniform(float *values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(twister_() & 0xFFFFFF) * 0x1p-24f;
}

double Generator::draw_one() {
    if (spare_) {
        const double value = *spare_;
        spare_.reset();
        return value;
    }
    const auto uniform = [this] {
        const std::uint64_t high = twister_();
        return static_cast<double>((high << 32 | twister_()) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
    };
    const double u1 = uniform(), u2 = uniform();
    const double radius = std::sqrt(-2 * std::log1p(-u2)), angle = TWO_PI * u1;
    spare_ = radius * std::sin(angle);
    return radius * std::cos(angle);
}

}  // namespace ldm::runtime
