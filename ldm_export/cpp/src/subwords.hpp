// The model of a tokenizer.json: a word to tokens of its vocabulary.
#pragma once

#include "bpe.hpp"
#include "json.hpp"

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace ldm::runtime {

struct Token {
    TokenId id;
    std::string text;
};

class Subwords {
  public:
    virtual ~Subwords() = default;

    virtual void append(const std::u32string &word, std::vector<Token> &tokens) const = 0;

    const Vocabulary &vocabulary() const { return vocabulary_; }

  protected:
    // What a byte of text that no token covers is.
    struct ByteTokens {
        std::array<TokenId, 256> ids;
        Token operator[](char byte) const;
    };

    // Keep the ids of "<0x00>" to "<0xFF>", which must be in the vocabulary, if there is a fallback to bytes.
    void read_byte_fallback(const Json &model);

    Vocabulary vocabulary_;
    std::unique_ptr<ByteTokens> bytes_;
};

// Throws MalformedError unless it is of a type that is read.
std::unique_ptr<Subwords> subwords_of(const Json &model);

bool is_id(const Json &value);

}  // namespace ldm::runtime
