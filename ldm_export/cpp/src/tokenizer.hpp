// CLIP's tokenizer (Radford et al. 2021): a prompt to the row of ids that the text encoder reads.
//
// Added tokens are cut out; the rest is normalised (NFC, white space to one space, lower case) and split into words; each
// word's UTF-8 bytes, the last one marked </w>, are merged pair by pair; the ids are put between start and end and padded
// on the right. Before that an added token T, where T_1 was added too (a textual inversion of several vectors), is written
// out as "T T_1 T_2 ...", as diffusers does. Equal to ldm_export/runtime/tokenizer.py on the same folder.
#pragma once

#include "tokenizer_files.hpp"

#include <array>
#include <functional>
#include <string_view>

namespace ldm::runtime {

using Warn = std::function<void(const std::string &sentence)>;

class Tokenizer {
  public:
    // Throws BundleError if a file is missing, is not what it should be, or contradicts another.
    Tokenizer(const std::string &folder, const ReadText &read);

    // The ids of a prompt, max_length of them; `warn` is called with what is cut off. Throws InputError unless it is UTF-8.
    std::vector<TokenId> operator()(std::string_view prompt, const Warn &warn) const;

    std::size_t max_length() const { return max_length_; }

  private:
    struct Pattern {
        std::u32string text;
        TokenId id;
    };

    struct WrittenOut {
        std::u32string token, vectors;
    };

    void register_tokens(const std::vector<AddedToken> &tokens);
    std::u32string written_out(std::u32string prompt) const;
    std::vector<TokenId> body(const std::u32string &prompt) const;
    void split(const std::u32string &text, const std::vector<Pattern> &patterns, std::vector<TokenId> &ids,
               const std::function<void(const std::u32string &)> &rest) const;
    void append_words(const std::u32string &text, std::vector<TokenId> &ids) const;
    void append_word(std::u32string_view word, std::vector<TokenId> &ids) const;
    std::string text_of(const std::vector<TokenId> &ids, std::size_t from) const;

    std::size_t max_length_;
    TokenId bos_, eos_, pad_, unk_;
    Bpe bpe_;
    std::array<TokenId, 256> bytes_{}, last_bytes_{};       // symbol of a byte inside a word, and of a word's last
    std::unordered_map<TokenId, std::string> texts_;        // by id, as the vocabulary writes them
    std::unordered_map<std::string, TokenId> added_;        // ids by content
    std::map<TokenId, AddedToken> flags_;                   // how added tokens are matched
    std::vector<Pattern> raw_, normalized_;                 // looked for before and after normalisation
    std::unordered_map<TokenId, WrittenOut> written_out_;   // added tokens of several vectors
};

}  // namespace ldm::runtime
