#include "subwords.hpp"

#include "bpe_model.hpp"
#include "normalizers.hpp"
#include "unigram.hpp"

#include <cstdio>

namespace ldm::runtime {

namespace {

std::string token_of_byte(std::size_t byte) {
    char text[16];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(byte));
    return text;
}

}  // namespace

Token Subwords::ByteTokens::operator[](char byte) const {
    const auto number = static_cast<unsigned char>(byte);
    return {ids[number], token_of_byte(number)};
}

void Subwords::read_byte_fallback(const Json &model) {
    if (!need(model, "byte_fallback", Kind::boolean).boolean()) return;
    bytes_ = std::make_unique<ByteTokens>();
    for (std::size_t byte = 0; byte < 256; ++byte) {
        const auto found = vocabulary_.find(token_of_byte(byte));
        if (found == vocabulary_.end()) throw MalformedError("falls back to bytes, and lacks the token of one");
        bytes_->ids[byte] = found->second;
    }
}

std::unique_ptr<Subwords> subwords_of(const Json &model) {
    const Json &kind = model["type"];
    if (kind.is(Kind::text) && kind.text() == "Unigram") return std::make_unique<Unigram>(model);
    if (kind.is(Kind::text) && kind.text() == "BPE") return std::make_unique<BpeModel>(model);
    throw MalformedError("has no model of the type Unigram or BPE");
}

bool is_id(const Json &value) { return value.is(Kind::integer) && value.integer() >= 0 && value.integer() <= INT32_MAX; }

}  // namespace ldm::runtime
