// What a caller asks for, checked before anything runs; as ldm_export/runtime/request.py.
#pragma once

#include "adapters.hpp"
#include "facts.hpp"
#include "levels.hpp"
#include "plan.hpp"
#include "prompts.hpp"
#include "tensor.hpp"

#include <ldm/ldm.h>

#include <optional>
#include <string>
#include <vector>

namespace ldm::runtime {

struct Request {
    std::vector<std::string> prompts, negative_prompts;  // one a picture; empty for models that read no text
    bool no_negative_prompt;                             // none was given; "" stands for each
    std::optional<Tensor> class_labels;                  // int64 (B,)
    std::vector<std::int64_t> seeds;                     // one a picture
    std::uint32_t height, width;                         // pixels
    double guidance;                                     // 1 is off
    double image_guidance;                               // of a model that edits the image, the scale towards it; else 0
    std::optional<Tensor> image;                         // float32 (B, C, H, W) in [-1, 1] to start from or to edit
    std::optional<Tensor> mask;                          // float32 (B, H, W) in [0, 1], 1 where the image is drawn anew
    std::vector<Scales> levels;  // of the latents before each row, where the image's are put back after it; else none
    bool keep_pixels;            // pixels that are not drawn anew are the image's
    Trajectory trajectory;
    std::vector<Mixture> mixtures;  // what adapters each picture is drawn with
    std::size_t deepcache;
    std::string loop;  // the loop graph that draws all in one call, or empty
    Reading reading;   // of the prompts

    std::size_t batch() const { return seeds.size(); }
};

// Throws InputError for anything that the bundle cannot draw; the sentence says what it can.
Request checked_request(const Bundle &bundle, const Facts &facts, const char *const *prompts, std::size_t count,
                        const ldm_draw_options &options);

}  // namespace ldm::runtime
