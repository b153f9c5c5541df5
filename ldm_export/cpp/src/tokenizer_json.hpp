// Tokenizers that a tokenizer.json of the Python package `tokenizers` describes whole.
//
// A prompt may be made lower case first. Added tokens are cut out; normalizers rewrite the rest, pre-tokenizers split it into words, and a model makes tokens of
// those; the ids are put between special tokens and padded. Which files are read, and what comes of them, is what
// ldm_export/runtime/tokenizer_json.py says.
#pragma once

#include "added_tokens.hpp"
#include "normalizers.hpp"
#include "pre_tokenizers.hpp"
#include "subwords.hpp"
#include "tokenizer.hpp"

#include <unordered_set>

namespace ldm::runtime {

class JsonTokenizer : public Tokenizer {
  public:
    explicit JsonTokenizer(const TokenizerFiles &files);

    std::vector<TokenId> operator()(std::string_view prompt, const Warn &warn) const override;

    std::size_t max_length() const override { return max_length_; }
    const char *length_file() const override;

  private:
    void read(const Json &document);
    void read_length_and_padding(const Json &truncation, const Json &padding);
    void read_added_tokens(const Json &document);
    void read_template(const Json &part);
    std::vector<TokenId> ids_of_special(const Json &name, const Json &special_tokens) const;

    void normalise(Piece &piece) const;
    std::vector<Token> body(const std::u32string &prompt) const;
    void append(Piece piece, std::vector<Token> &tokens) const;

    std::size_t max_length_ = 0;
    TokenId pad_ = 0;
    bool pads_left_ = false, lowercase_ = false;
    std::vector<Normalizer> normalizers_;
    std::vector<PreTokenizer> pre_tokenizers_;
    std::unique_ptr<Subwords> model_;
    AddedTokens added_;
    std::unordered_map<TokenId, std::string> texts_;  // of all tokens, by id
    std::vector<TokenId> before_, after_;             // the special tokens around a text
};

}  // namespace ldm::runtime
