// The files of CLIP's tokenizer, each checked as it is read.
#pragma once

#include "added_tokens.hpp"
#include "tokenizer_files.hpp"

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

enum Role : std::size_t { BOS, EOS, UNK, PAD };

struct ClipFiles {
    Vocabulary vocabulary;
    std::vector<std::pair<std::string, std::string>> merges;  // in order of rank
    std::array<AddedToken, 4> named;                          // by role
    std::map<TokenId, AddedToken> added;
    std::vector<AddedToken> in_order;  // all tokens as transformers registers them: of equal ones the last one's flags hold
    std::size_t max_length;
};

// Throws BundleError, with the file's name.
ClipFiles read_clip_files(const TokenizerFiles &files);

}  // namespace ldm::runtime
