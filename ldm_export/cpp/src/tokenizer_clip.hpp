// CLIP's tokenizer (Radford et al. 2021): a prompt to the row of ids that the text encoder reads.
//
// Added tokens are cut out; the rest is normalised (NFC, white space to one space, lower case) and split into words; each
// word's UTF-8 bytes, the last one marked </w>, are merged pair by pair; the ids are put between start and end and padded
// on the right. Before that an added token T, where T_1 was added too (a textual inversion of several vectors), is written
// out as "T T_1 T_2 ...", as diffusers does. Equal to
// ldm_export/runtime/tokenizer_clip.py on the same folder.
#pragma once

#include "added_tokens.hpp"
#include "tokenizer.hpp"

#include <array>
#include <string_view>

namespace ldm::runtime {

class ClipTokenizer : public Tokenizer {
  public:
    explicit ClipTokenizer(const TokenizerFiles &files);

    std::vector<TokenId> operator()(std::string_view prompt, const Warn &warn) const override;

    // The steps that make a row of ids: all ids of a prompt; those that there is room for, `warn` being told what is cut off;
    // and these between start and end, with padding.
    std::vector<TokenId> all(std::string_view prompt) const;
    void cut(std::vector<TokenId> &ids, const Warn &warn) const;
    std::vector<TokenId> framed(std::vector<TokenId> ids) const;

    std::size_t max_length() const override { return max_length_; }
    const char *length_file() const override { return "tokenizer_config.json"; }

  private:
    struct WrittenOut {
        std::u32string token, vectors;
    };

    std::u32string written_out(std::u32string prompt) const;
    std::vector<TokenId> body(const std::u32string &prompt) const;
    void append_words(const std::u32string &text, std::vector<TokenId> &ids) const;
    void append_word(std::u32string_view word, std::vector<TokenId> &ids) const;
    std::string text_of(const std::vector<TokenId> &ids, std::size_t from) const;

    std::size_t max_length_;
    TokenId bos_, eos_, pad_, unk_;
    Bpe bpe_;
    std::array<TokenId, 256> bytes_{}, last_bytes_{};       // symbol of a byte inside a word, and of a word's last
    AddedTokens added_;
    std::unordered_map<TokenId, std::string> texts_;        // by id, as the vocabulary writes them
    std::unordered_map<TokenId, WrittenOut> written_out_;   // added tokens of several vectors
};

}  // namespace ldm::runtime
