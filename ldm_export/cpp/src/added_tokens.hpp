// Added tokens: texts that are cut out of a prompt and keep their own ids, as the Python package `tokenizers` does it.
#pragma once

#include "bpe.hpp"

#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace ldm::runtime {

struct AddedToken {
    std::string content;
    bool special = false;
    bool single_word = false;   // only where no word goes on beside it
    bool lstrip = false;        // takes white space before it along
    bool rstrip = false;        // and after it
    std::optional<bool> normalized{};  // found in the normalised text; by default unless it is special

    bool is_normalized() const { return normalized.value_or(!special); }
};

class AddedTokens {
  public:
    static constexpr TokenId NONE = -1;

    // A stretch of a text: an added token with the white space that it takes along, or what is between two, without an id.
    struct Part {
        std::size_t start, stop;
        TokenId id;
    };

    using Normalise = std::function<std::u32string(const std::u32string &)>;

    AddedTokens() = default;

    // Tokens in the order in which they are added. One of the vocabulary has its id, others have the next ones; of tokens
    // with equal content the last one's flags hold, and the first special one's place.
    AddedTokens(const std::vector<AddedToken> &tokens, const Vocabulary &vocabulary, const Normalise &normalise);

    const Vocabulary &ids() const { return ids_; }  // by content

    // Cut a text up at those that are found before normalisation, or at those that are found after it. Nothing is empty.
    std::vector<Part> parts_of_raw(const std::u32string &text) const { return parts(text, raw_); }
    std::vector<Part> parts_of_normalised(const std::u32string &text) const { return parts(text, normalised_); }

  private:
    struct Pattern {
        std::u32string text;
        TokenId id;
    };
    using Patterns = std::unordered_map<char32_t, std::vector<Pattern>>;  // by first character, in order of place

    std::vector<Part> parts(const std::u32string &text, const Patterns &patterns) const;

    Vocabulary ids_;
    std::unordered_map<TokenId, AddedToken> flags_;  // how they are matched
    Patterns raw_, normalised_;                      // looked for before and after normalisation
};

}  // namespace ldm::runtime
