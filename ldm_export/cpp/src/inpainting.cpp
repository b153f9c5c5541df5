#include "inpainting.hpp"

#include "error.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

namespace {

constexpr float HARD = 0.5f;  // least value that is 1 to models that were trained with masks of 0 and 1 alone

void check_one(const std::uint8_t *mask, std::size_t number, std::size_t height, std::size_t width, std::size_t factor,
               bool hard) {
    const std::uint8_t least = hard ? 128 : 1;
    bool any = false, white = false, seen = false;
    for (std::size_t y = 0; y < height; ++y)
        for (std::size_t x = 0; x < width; ++x) {
            const std::uint8_t value = mask[y * width + x];
            any = any || value != 0;
            white = white || value >= least;
            seen = seen || (value >= least && y % factor == 0 && x % factor == 0);
        }
    if (!white)
        throw InputError(join("Mask ", number, " is ", any ? "darker than 128" : "black",
                              " everywhere, so nothing would be drawn anew. Make a part white."));
    if (!seen)
        throw InputError(join("Mask ", number, " is white between the latents only, of which each reads one of ", factor, "x",
                              factor, " pixels, its top left one; nothing would be drawn anew. Make the white part larger."));
}

}  // namespace

Tensor checked_mask(const std::uint8_t *masks, std::size_t given, std::size_t count, std::size_t height, std::size_t width,
                    std::size_t factor, bool hard) {
    if (given != 1 && given != count)
        throw InputError(join(given, " masks were given for ", count, " pictures. Give one, or one each."));
    const std::size_t plane = height * width;
    for (std::size_t k = 0; k < given; ++k) check_one(masks + k * plane, k, height, width, factor, hard);
    Tensor made = Tensor::zeros<float>({static_cast<std::int64_t>(count), static_cast<std::int64_t>(height),
                                        static_cast<std::int64_t>(width)});
    for (std::size_t k = 0; k < count; ++k)
        std::transform(masks + (given == 1 ? 0 : k * plane), masks + (given == 1 ? 1 : k + 1) * plane, made.as<float>() + k * plane,
                       [](std::uint8_t value) { return static_cast<float>(value) / 255.0f; });
    return made;
}

Tensor latents_mask(const Tensor &mask, std::size_t factor, bool hard) {
    const auto step = static_cast<std::int64_t>(factor);
    const std::int64_t batch = mask.shape[0], height = mask.shape[1], width = mask.shape[2];
    Tensor made = Tensor::zeros<float>({batch, 1, (height + step - 1) / step, (width + step - 1) / step});
    float *out = made.as<float>();
    for (std::int64_t k = 0; k < batch; ++k)
        for (std::int64_t y = 0; y < height; y += step)
            for (std::int64_t x = 0; x < width; x += step) {
                const float value = mask.as<float>()[(k * height + y) * width + x];
                *out++ = hard ? (value >= HARD ? 1.0f : 0.0f) : value;
            }
    return made;
}

Tensor uncovered(const Tensor &image, const Tensor &mask) {
    Tensor made = image;
    const std::int64_t batch = image.shape[0], channels = image.shape[1], plane = image.shape[2] * image.shape[3];
    for (std::int64_t k = 0; k < batch; ++k)
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t i = 0; i < plane; ++i)
                if (mask.as<float>()[k * plane + i] >= HARD) made.as<float>()[(k * channels + c) * plane + i] = 0.0f;
    return made;
}

void KeptArea::restore(Tensor &latents, std::size_t done) const {
    const Scales scales = done < levels.size() ? levels[done] : Scales{1.0, 0.0};
    const auto image_scale = static_cast<float>(scales.first), noise_scale = static_cast<float>(scales.second);
    const std::int64_t batch = latents.shape[0], channels = latents.shape[1], plane = latents.shape[2] * latents.shape[3];
    for (std::int64_t k = 0; k < batch; ++k)
        for (std::int64_t c = 0; c < channels; ++c)
            for (std::int64_t i = 0; i < plane; ++i) {
                const std::int64_t at = (k * channels + c) * plane + i;
                const float anew = mask.as<float>()[k * plane + i];
                const float kept = image_latents.as<float>()[at] * image_scale + noise.as<float>()[at] * noise_scale;
                latents.as<float>()[at] = latents.as<float>()[at] * anew + kept * (1.0f - anew);
            }
}

void blend(Tensor &drawn, const Tensor &image, const Tensor &mask) {
    const std::size_t pixels = mask.count(), channels = drawn.count() / pixels;
    for (std::size_t i = 0; i < pixels; ++i) {
        const double share = mask.as<float>()[i];
        for (std::size_t c = 0; c < channels; ++c) {
            std::uint8_t &value = drawn.as<std::uint8_t>()[i * channels + c];
            const double mean = image.as<std::uint8_t>()[i * channels + c] * (1 - share) + value * share;
            value = static_cast<std::uint8_t>(std::nearbyint(mean));
        }
    }
}

}  // namespace ldm::runtime
