#include "bpe_model.hpp"

#include "error.hpp"
#include "normalizers.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <optional>
#include <utility>

namespace ldm::runtime {

namespace {

// The two tokens of a merge, which older files write with a space between.
std::optional<std::pair<std::string, std::string>> pair_of(const Json &merge) {
    if (merge.is(Kind::text)) {
        const std::string &text = merge.text();
        const std::size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) return std::nullopt;
        return std::make_pair(text.substr(0, space), text.substr(space + 1));
    }
    if (!merge.is(Kind::array) || merge.array().size() != 2) return std::nullopt;
    const Json &first = merge.array()[0], &second = merge.array()[1];
    if (!first.is(Kind::text) || !second.is(Kind::text)) return std::nullopt;
    return std::make_pair(first.text(), second.text());
}

void check_is_plain(const Json &model) {
    for (const char *key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (const Json &affix = model[key]; !affix.is_null() && !(affix.is(Kind::text) && affix.text().empty()))
            throw MalformedError("has a BPE with a prefix or a suffix, which is not read here");
    if (!model["dropout"].is_null()) throw MalformedError("has a BPE with dropout, which is not read here");
    const Json &ignores = model["ignore_merges"];
    if (!ignores.is_null() && !(ignores.is(Kind::boolean) && !ignores.boolean()))
        throw MalformedError("has a BPE with ignore_merges, which is not read here");
}

}  // namespace

BpeModel::BpeModel(const Json &model) {
    read_vocabulary(need(model, "vocab", Kind::object));
    const Json &unknown = model["unk_token"];
    const auto found = unknown.is(Kind::text) ? vocabulary_.find(unknown.text()) : vocabulary_.end();
    if (found == vocabulary_.end())
        throw MalformedError(join("has the unk_token ", short_repr(unknown), ", none of its vocabulary"));
    unknown_ = found->second;
    check_is_plain(model);
    fuses_unknown_ = need(model, "fuse_unk", Kind::boolean).boolean();
    for (const Json &merge : need(model, "merges", Kind::array).array()) read_merge(merge);
    read_byte_fallback(model);
}

void BpeModel::read_vocabulary(const Json &vocabulary) {
    for (const auto &[token, number] : vocabulary.object()) {
        if (token.empty() || !is_id(number))
            throw MalformedError(
                join("gives ", short_repr(token), " the id ", short_repr(number), "; ids are whole numbers from 0"));
        if (!texts_.emplace(number.integer(), token).second) throw MalformedError("gives two tokens the same id");
        vocabulary_.emplace(token, number.integer());
    }
}

void BpeModel::read_merge(const Json &merge) {
    const auto pair = pair_of(merge);
    if (!pair) throw MalformedError(join("has the merge ", short_repr(merge), "; a merge is two tokens"));
    const auto first = vocabulary_.find(pair->first), second = vocabulary_.find(pair->second);
    const auto both = vocabulary_.find(pair->first + pair->second);
    if (first == vocabulary_.end() || second == vocabulary_.end() || both == vocabulary_.end())
        throw MalformedError(join("has the merge ", short_repr(merge), " of what is not in its vocabulary"));
    merges_.add_merge(first->second, second->second, both->second);
}

void BpeModel::append(const std::u32string &word, std::vector<Token> &tokens) const {
    std::vector<TokenId> symbols;
    bool was_unknown = false;
    for (const char32_t &c : word) {
        const std::string character = encoded({&c, 1});
        const auto found = vocabulary_.find(character);
        const bool is_unknown = found == vocabulary_.end() && bytes_ == nullptr;
        if (found != vocabulary_.end())
            symbols.push_back(found->second);
        else if (bytes_ != nullptr)
            for (const char byte : character) symbols.push_back((*bytes_)[byte].id);
        else if (!was_unknown || !fuses_unknown_)
            symbols.push_back(unknown_);
        was_unknown = is_unknown;
    }
    for (const TokenId id : merges_.merged(symbols)) tokens.push_back({id, texts_.at(id)});
}

}  // namespace ldm::runtime
