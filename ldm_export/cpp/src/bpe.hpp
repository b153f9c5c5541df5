// Byte-pair encoding (Sennrich et al. 2016): a word's symbols are merged pair by pair, the best rank first.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ldm::runtime {

using TokenId = std::int64_t;
using Vocabulary = std::unordered_map<std::string, TokenId>;

class Bpe {
  public:
    // Merges in order of rank; both tokens of each, and what they make, must be in the vocabulary.
    void add_merge(TokenId first, TokenId second, TokenId merged);

    std::vector<TokenId> merged(const std::vector<TokenId> &symbols) const;

  private:
    struct Merge {
        std::uint32_t rank;
        TokenId merged;
    };
    const Merge *find(TokenId first, TokenId second) const;

    std::unordered_map<std::uint64_t, Merge> merges_;  // by first << 32 | second
    std::uint32_t count_ = 0;
};

}  // namespace ldm::runtime
