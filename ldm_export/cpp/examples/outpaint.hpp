// Room around a picture, and the mask to fill it; as --outpaint of `ldm-export generate`.
#ifndef LDM_EXAMPLES_OUTPAINT_HPP
#define LDM_EXAMPLES_OUTPAINT_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace outpaint {

struct Margins {
    std::size_t left = 0, top = 0, right = 0, bottom = 0;  // pixels
};

// "left=64,top=8" as margins, each a multiple of what a latent stands for. Throws std::invalid_argument.
inline Margins margins_from_text(const std::string &text, std::size_t multiple) {
    constexpr std::size_t most_digits = 7, largest = 1 << 20;
    Margins margins;
    std::map<std::string, std::size_t *> sides{
        {"left", &margins.left}, {"top", &margins.top}, {"right", &margins.right}, {"bottom", &margins.bottom}};
    std::size_t start = 0;
    while (start <= text.size()) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        const std::string part = text.substr(start, end - start), side = part.substr(0, part.find('='));
        const std::string digits = part.find('=') == std::string::npos ? "" : part.substr(part.find('=') + 1);
        if (sides.count(side) == 0 || digits.empty() || digits.size() > most_digits ||
            digits.find_first_not_of("0123456789") != std::string::npos)
            throw std::invalid_argument("--outpaint is SIDE=PIXELS,... of left, top, right and bottom, such as left=64,right=64.");
        const std::size_t margin = std::stoul(digits);
        if (margin % multiple != 0 || margin > largest)
            throw std::invalid_argument(digits + " pixels were asked for (" + side + ") around the image; each side takes a " +
                                        "multiple of " + std::to_string(multiple) + ", up to " + std::to_string(largest) + ".");
        *sides[side] = margin;
        sides.erase(side);  // once each
        start = end + 1;
    }
    return margins;
}

// Pixels (height, width, channels) with room around them: of this value, or without one of the colours of the edge, which the
// encoder takes for more of the same.
inline std::vector<std::uint8_t> with_room(const std::uint8_t *pixels, std::size_t height, std::size_t width,
                                           std::size_t channels, const Margins &margins,
                                           std::optional<std::uint8_t> value = std::nullopt) {
    std::vector<std::uint8_t> made;
    const auto nearest = [](std::size_t at, std::size_t before, std::size_t size) {
        return at < before ? 0 : std::min(at - before, size - 1);
    };
    for (std::size_t y = 0; y < margins.top + height + margins.bottom; ++y)
        for (std::size_t x = 0; x < margins.left + width + margins.right; ++x) {
            const std::size_t row = nearest(y, margins.top, height), column = nearest(x, margins.left, width);
            const bool inside = row + margins.top == y && column + margins.left == x;
            const std::uint8_t *pixel = pixels + (row * width + column) * channels;
            for (std::size_t c = 0; c < channels; ++c) made.push_back(inside || !value ? pixel[c] : *value);
        }
    return made;
}

}  // namespace outpaint
#endif
