// The files of a tokenizer folder in the Hugging Face layout, each checked as it is read.
#pragma once

#include "bpe.hpp"

#include <array>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

// A token that is cut out of a prompt before the rest is merged from bytes.
struct AddedToken {
    std::string content;
    bool special = false;
    bool single_word = false;   // only where no word goes on beside it
    bool lstrip = false;        // takes white space before it along
    bool rstrip = false;        // and after it
    std::optional<bool> normalized{};  // found in the normalised text; by default unless it is special

    bool is_normalized() const { return normalized.value_or(!special); }
};

enum Role : std::size_t { BOS, EOS, UNK, PAD };

struct TokenizerFiles {
    Vocabulary vocabulary;
    std::vector<std::pair<std::string, std::string>> merges;  // in order of rank
    std::array<AddedToken, 4> named;                          // by role
    std::map<TokenId, AddedToken> added;
    std::vector<AddedToken> in_order;  // all tokens as transformers registers them: of equal ones the last one's flags hold
    std::size_t max_length;
};

// The UTF-8 text of a file of the folder, none if it has no such file.
using ReadText = std::function<std::optional<std::string>(const std::string &name)>;

// Throws BundleError, with the file's name. folder: what errors call it.
TokenizerFiles read_tokenizer_files(const std::string &folder, const ReadText &read);

}  // namespace ldm::runtime
