// What a caller asks for, checked before anything runs; as ldm_export/runtime/request.py.
#pragma once

#include "facts.hpp"
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
    std::optional<Tensor> image;                         // float32 (B, C, H, W) in [-1, 1] to start from
    Trajectory trajectory;
    std::size_t deepcache;
    std::string loop;  // the loop graph that draws all in one call, or empty
    Reading reading;   // of the prompts

    std::size_t batch() const { return seeds.size(); }
};

// Throws InputError for anything that the bundle cannot draw; the sentence says what it can.
Request checked_request(const Bundle &bundle, const Facts &facts, const char *const *prompts, std::size_t count,
                        const ldm_draw_options &options);

}  // namespace ldm::runtime
