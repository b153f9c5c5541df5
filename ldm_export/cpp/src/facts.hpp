// What a bundle says that drawing needs, checked.
#pragma once

#include "bundle.hpp"

#include <cstdint>
#include <string>

namespace ldm::runtime {

struct Facts {
    std::uint32_t height, width;  // pixels, by default
    std::uint32_t latent_channels, pixels_per_latent;
    std::uint32_t largest_size;  // pixels that a picture is high and wide at most
    bool strength_rounds_up;  // from an image a part of a step counts as one
    std::uint32_t size_step;  // pixels that heights and widths are multiples of: a side of one of the denoiser's tokens
    std::uint32_t picture_channels;  // 3, or 1 for grey models
    std::string default_sampler;
    std::uint32_t default_steps;
    Guidance guidance;
    bool reads_text, takes_classes;
    bool edits;                 // reads the latents of a picture beside its own, and has two guidances
    bool reads_image_latents;   // beside the sample, otherwise: for inpainting, or what this runtime does not do
    bool inpaints;              // reads a mask before them
    std::uint32_t class_count;  // 0: not given, or takes none

    // Tokens of a picture of so many pixels; without a patch_size one a latent.
    std::int64_t tokens(std::uint32_t high, std::uint32_t wide) const {
        return std::int64_t{high / size_step} * (wide / size_step);
    }
};

// Throws BundleError unless the bundle has the graphs and says the facts.
Facts facts_of(const Bundle &bundle);

}  // namespace ldm::runtime
