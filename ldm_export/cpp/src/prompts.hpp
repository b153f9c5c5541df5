// Prompts that are read otherwise than as they stand: with weights of their parts, or in chunks where they are long. The
// syntax, and what weights and chunks do, is in the docstring of ldm_export/runtime/prompts.py, which this equals.
#pragma once

#include "manifest.hpp"
#include "tensor.hpp"
#include "tokenizer.hpp"

#include <set>
#include <string>
#include <vector>

namespace ldm::runtime {

struct Reading {
    bool weights = false;  // brackets are weights
    bool chunks = false;   // long prompts are read in chunks, and not cut off
};

struct Part {
    std::string text;
    double weight;
};

// One row of token ids for a text encoder.
struct TokenRow {
    std::vector<TokenId> ids;
    std::vector<float> weights;  // as many; empty where all are 1
};

// Throws InputError unless the model's prompts can be read so; `whole` is whether a loop graph is to draw.
void check_reading(const Reading &reading, const Roles &roles, const GraphSpecs &graphs, bool whole);

// The denoiser's inputs that have a free number of tokens, (B, tokens, width).
std::set<std::string> joined_conditions(const Roles &roles, const GraphSpecs &graphs);

// The parts of a prompt; neighbours of the same weight are one. Throws InputError for weights above 100 or below -100, and
// for more than 100 brackets within one another.
std::vector<Part> weighted_parts(const std::string &prompt);

// The rows of token ids of a prompt: several where it is read in chunks, and else one. Throws InputError.
std::vector<TokenRow> token_rows(const Tokenizer &tokenizer, const std::string &prompt, const Reading &reading,
                                 const Warn &warn);

// Multiply states, float32 (L, width), by the weights of their tokens, and all so that their mean is what it was.
void weigh(Tensor &states, const std::vector<float> &weights);

}  // namespace ldm::runtime
