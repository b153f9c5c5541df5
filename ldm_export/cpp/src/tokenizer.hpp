// Tokenizers of a bundle's text encoders: a prompt to the row of ids that the encoder reads.
#pragma once

#include "bpe.hpp"
#include "tokenizer_files.hpp"

#include <functional>
#include <memory>
#include <string_view>
#include <vector>

namespace ldm::runtime {

using Warn = std::function<void(const std::string &sentence)>;

constexpr const char *TOKENIZER_KINDS[] = {"clip", "tokenizers"};  // those that are read, as manifests name them

class Tokenizer {
  public:
    virtual ~Tokenizer() = default;

    // The ids of a prompt, max_length of them; `warn` is called with what is cut off. Throws InputError where the prompt is
    // not UTF-8, or begins or ends as padding does.
    virtual std::vector<TokenId> operator()(std::string_view prompt, const Warn &warn) const = 0;

    virtual std::size_t max_length() const = 0;
    virtual const char *length_file() const = 0;  // which of its files says the length
};

// What reads a folder's files, of one of the kinds. Throws BundleError if a file is missing, is not what it should be, or
// contradicts another.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string &kind, const TokenizerFiles &files);

}  // namespace ldm::runtime
