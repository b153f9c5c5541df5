#include "tokenizer.hpp"

#include "tokenizer_clip.hpp"
#include "tokenizer_json.hpp"

namespace ldm::runtime {

std::unique_ptr<Tokenizer> open_tokenizer(const std::string &kind, const TokenizerFiles &files) {
    if (kind == TOKENIZER_KINDS[0]) return std::make_unique<ClipTokenizer>(files);
    return std::make_unique<JsonTokenizer>(files);
}

}  // namespace ldm::runtime
