// A unigram model (Kudo, 1804.10959): a word is split into the tokens of which the product of probabilities is highest.
#pragma once

#include "subwords.hpp"

#include <string_view>

namespace ldm::runtime {

class Unigram : public Subwords {
  public:
    // Throws MalformedError unless the model is what it should be.
    explicit Unigram(const Json &model);

    void append(const std::u32string &word, std::vector<Token> &tokens) const override;

  private:
    struct Entry {
        std::string_view text;
        TokenId id;
        double score;  // logarithm of the probability
    };

    // The best way to some place of a word.
    struct Way {
        double score = 0;
        std::size_t from = NOWHERE;  // where its last token begins
        TokenId id = 0;              // that token
    };
    static constexpr std::size_t NOWHERE = static_cast<std::size_t>(-1);

    void read_entries(const Json &vocabulary);
    void read_unknown(const Json &model);
    std::vector<Way> ways(std::string_view word) const;
    void append_piece(const std::string &piece, std::vector<Token> &tokens) const;

    std::vector<Entry> entries_;  // by text; those that begin alike are neighbours, which is what a trie is needed for
    TokenId unknown_ = 0;
    double unknown_score_ = 0;
};

}  // namespace ldm::runtime
