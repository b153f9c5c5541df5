// The map of characters of SentencePiece's normalisation: a trie of UTF-8 bytes (a double array, darts-clone) whose leaves
// point to the texts that stand for them.
#pragma once

#include "piece.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ldm::runtime {

class Charsmap {
  public:
    // In base64: the trie's size in bytes, the trie, and the texts, each ended by a zero. Throws MalformedError unless it
    // can be walked.
    explicit Charsmap(const std::string &base64);

    // Replace each grapheme cluster, or in long ones each character, of which the trie knows a prefix, by the shortest
    // one's text.
    void apply(Piece &piece) const;

    // Characters of the longest text.
    std::size_t longest() const;

  private:
    void check() const;
    std::optional<std::string_view> find(std::string_view key) const;

    std::vector<std::uint32_t> trie_;
    std::string texts_;
};

}  // namespace ldm::runtime
