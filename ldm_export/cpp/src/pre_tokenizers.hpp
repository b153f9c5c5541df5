// Pre-tokenizers of a tokenizer.json, which split what is between added tokens into words.
#pragma once

#include "json.hpp"
#include "piece.hpp"

#include <functional>
#include <vector>

namespace ldm::runtime {

using PreTokenizer = std::function<std::vector<Piece>(Piece piece)>;

// None where there is none. Throws MalformedError where there is one that is not read.
std::vector<PreTokenizer> pre_tokenizers_of(const Json &part);

}  // namespace ldm::runtime
