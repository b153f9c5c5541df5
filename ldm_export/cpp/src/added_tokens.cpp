#include "added_tokens.hpp"

#include "unicode.hpp"

#include <algorithm>
#include <unordered_set>

namespace ldm::runtime {

AddedTokens::AddedTokens(const std::vector<AddedToken> &tokens, const Vocabulary &vocabulary, const Normalise &normalise) {
    const auto vocabulary_size = static_cast<TokenId>(vocabulary.size());
    std::vector<const AddedToken *> places;
    std::unordered_set<std::string> special;
    for (const AddedToken &token : tokens)
        if (token.special && special.insert(token.content).second) places.push_back(&token);
    TokenId largest = NONE;
    for (const AddedToken &token : tokens) {
        TokenId id;
        if (const auto before = ids_.find(token.content); before != ids_.end())
            id = before->second;
        else if (const auto there = vocabulary.find(token.content); there != vocabulary.end())
            id = there->second;
        else
            id = largest >= vocabulary_size || vocabulary_size == 0 ? largest + 1 : vocabulary_size;
        largest = std::max(largest, id);
        ids_[token.content] = id;
        flags_[id] = token;
        if (special.count(token.content) == 0) places.push_back(&token);
    }
    for (const AddedToken *token : places) {
        const std::u32string content = decoded(token->content);
        const std::u32string text = token->is_normalized() ? normalise(content) : content;
        if (!text.empty()) (token->is_normalized() ? normalised_ : raw_)[text[0]].push_back({text, ids_.at(token->content)});
    }
}

// From left to right, of the patterns that begin at one place the longest.
std::vector<AddedTokens::Part> AddedTokens::parts(const std::u32string &text, const Patterns &patterns) const {
    std::vector<Part> found;
    std::size_t done = 0;  // up to here the text has been given away
    for (std::size_t at = 0; at < text.size();) {
        const Pattern *longest = nullptr;
        if (const auto here = patterns.find(text[at]); here != patterns.end())
            for (const Pattern &pattern : here->second)
                if (text.compare(at, pattern.text.size(), pattern.text) == 0 &&
                    (longest == nullptr || pattern.text.size() > longest->text.size()))
                    longest = &pattern;
        if (longest == nullptr) {
            ++at;
            continue;
        }
        std::size_t start = at, stop = at + longest->text.size();
        at = stop;
        const AddedToken &token = flags_.at(longest->id);
        const bool goes_on = (start > 0 && is_word_character(text[start - 1])) ||
                             (stop < text.size() && is_word_character(text[stop]));
        if (token.single_word && goes_on) continue;
        while (token.lstrip && start > done && is_space(text[start - 1])) --start;
        while (token.rstrip && stop < text.size() && is_space(text[stop])) ++stop;
        if (done < start) found.push_back({done, start, NONE});
        found.push_back({start, stop, longest->id});
        done = stop;
    }
    if (done < text.size()) found.push_back({done, text.size(), NONE});
    return found;
}

}  // namespace ldm::runtime
