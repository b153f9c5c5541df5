// Normalizers of a tokenizer.json, which rewrite what is between added tokens.
#pragma once

#include "json.hpp"
#include "piece.hpp"

#include <functional>
#include <vector>

namespace ldm::runtime {

using Normalizer = std::function<void(Piece &piece)>;

// None where there is none. Throws MalformedError where there is one that is not read.
std::vector<Normalizer> normalizers_of(const Json &part);

// The parts of a Sequence, or the one part; each an object with a type.
std::vector<Json> sequence_of(const Json &part, const char *items);

// The text of a pattern that is a String.
std::u32string pattern_of(const Json &pattern);

// A member of this kind.
const Json &need(const Json &part, const char *key, Kind kind);

}  // namespace ldm::runtime
