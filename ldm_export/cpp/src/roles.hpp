// Which graph of a bundle fills which role, and what it is given; as ldm_export/contract.py and bundle/roles.py.
//
//   text_encoder, any number    token ids (B, L) -> states
//   conditioner, or none        states, and what was asked for -> inputs of the denoiser
//   denoiser                    sample (B, C, h, w), timestep (B,), conditions -> out_sample (B, C, h, w)
//   vae_decoder, vae_encoder    latents as the sampler has them <-> pixels in [-1, 1]
//
// A source is "<text encoder>.<output>", "conditioner.<output>", or one of what a request gives.
#pragma once

#include "json.hpp"

#include <map>
#include <set>
#include <string>
#include <vector>

namespace ldm::runtime {

constexpr std::int64_t LEAST_TOKENS = 2;  // of a text: start and end

struct GraphSpec;
struct TensorSpec;
using GraphSpecs = std::map<std::string, GraphSpec>;  // by name

// How pictures are guided towards the prompt (classifier-free guidance, 2207.12598).
enum class GuidanceKind {
    three_rows,  // of a model that edits a picture, three are combined: with neither, with the picture, with both
    two_rows,    // two predictions are combined, with the prompt and without
    input,       // the denoiser is given the scale
    none         // there is one prediction, as it is; the scale is what was trained into it, 1 being nothing
};
constexpr double IMAGE_GUIDANCE = 1.5;  // towards the picture that is edited, by default

struct Guidance {
    GuidanceKind kind = GuidanceKind::none;
    double scale = 1;  // by default

    // Rows of a call that each picture takes; at a scale of 1 and below guidance is off, and where there are three, at one
    // below 1 towards the picture, too.
    std::size_t rows(double asked, double towards_image) const {
        if (kind == GuidanceKind::three_rows) return asked > 1 && towards_image >= 1 ? 3 : 1;
        return kind == GuidanceKind::two_rows && asked > 1 ? 2 : 1;
    }
};

struct TextEncoder {
    std::string graph;
    std::string tokenizer;  // the folder of its files
    std::string kind;       // what reads them
    std::int64_t length;    // token ids of a text, with start, end and padding
};

struct Roles {
    std::string denoiser, vae_decoder, vae_encoder;  // names of graphs
    Guidance guidance;
    std::vector<TextEncoder> text_encoders;
    std::string conditioner;                        // empty: there is none
    std::map<std::string, std::string> conditions;  // source of each further input of the denoiser

    std::vector<std::string> graphs() const;                     // in the order in which they run
    std::set<std::string> sources(const GraphSpecs &all) const;  // that a denoising call reads
    // What the names of a loop's token ids end in, of the k-th text encoder: nothing, "_2", "_3", ...
    static std::string suffix(std::size_t k) { return k == 0 ? "" : "_" + std::to_string(k + 1); }
};

// The field "roles" of a manifest; throws MalformedError.
Roles roles_from_json(const Json &entry, const GraphSpecs &graphs);

// The input that class labels go to; null if nothing reads them.
const TensorSpec *labels_of(const Roles &roles, const GraphSpecs &graphs);

}  // namespace ldm::runtime
