// Byte-pair encoding of a word's characters, and of the bytes of those that the vocabulary lacks.
#pragma once

#include "subwords.hpp"

#include <unordered_map>

namespace ldm::runtime {

class BpeModel : public Subwords {
  public:
    // Throws MalformedError unless the model is what it should be.
    explicit BpeModel(const Json &model);

    void append(const std::u32string &word, std::vector<Token> &tokens) const override;

  private:
    void read_vocabulary(const Json &vocabulary);
    void read_merge(const Json &merge);

    Bpe merges_;
    std::unordered_map<TokenId, std::string> texts_;
    TokenId unknown_ = 0;
    bool fuses_unknown_ = false;  // whether neighbours that are unknown are one token
};

}  // namespace ldm::runtime
