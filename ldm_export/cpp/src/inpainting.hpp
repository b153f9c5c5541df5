// Keeping a part of a picture: masks, what of the latents stays the picture's, and what of the pixels; as
// ldm_export/runtime/inpainting.py.
#pragma once

#include "levels.hpp"
#include "tensor.hpp"

#include <cstdint>

namespace ldm::runtime {

// Masks, `given` of them, uint8 (height, width) as float32 (count, height, width) in [0, 1]; one serves all. Throws
// InputError if they leave nothing to be drawn anew.
//   factor: pixels a side of what one latent stands for
//   hard: whether 127 and less is taken for 0, and 128 and more for 255, by what reads it
Tensor checked_mask(const std::uint8_t *masks, std::size_t given, std::size_t count, std::size_t height, std::size_t width,
                    std::size_t factor, bool hard);

// A mask (B, H, W) at the latents' size, (B, 1, h, w): each latent's top left pixel; 0 or 1 where it is `hard`.
Tensor latents_mask(const Tensor &mask, std::size_t factor, bool hard = false);

// Pictures (B, C, H, W) with zeros where the mask (B, H, W), taken for 0 or 1, is 1.
Tensor uncovered(const Tensor &image, const Tensor &mask);

// The part of the latents that stays a picture's.
struct KeptArea {
    Tensor image_latents, noise;  // float32 (B, C, h, w), of the picture, and what its latents are noised by
    Tensor mask;                  // float32 (B, 1, h, w), 1 where latents are drawn anew
    const std::vector<Scales> &levels;

    // Put the picture's latents back in the kept area after `done` rows.
    void restore(Tensor &latents, std::size_t done) const;
};

// Change pictures `drawn`, uint8 (B, H, W, C), to `image`, likewise, where the mask (B, H, W) is 0, to the bit, and to
// their mean so weighed where it is between 0 and 1.
void blend(Tensor &drawn, const Tensor &image, const Tensor &mask);

}  // namespace ldm::runtime
