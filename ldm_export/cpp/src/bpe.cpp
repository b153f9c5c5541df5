#include "bpe.hpp"

#include <queue>
#include <tuple>

namespace ldm::runtime {

namespace {

constexpr std::size_t NONE = static_cast<std::size_t>(-1);

struct Symbol {
    TokenId id;
    std::size_t before, after;
    bool gone = false;
};

struct Candidate {
    std::uint32_t rank;
    std::size_t at;
    TokenId merged;
    bool operator<(const Candidate &other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
};

std::uint64_t key_of(TokenId first, TokenId second) {
    return static_cast<std::uint64_t>(first) << 32 | static_cast<std::uint64_t>(second);
}

}  // namespace

void Bpe::add_merge(TokenId first, TokenId second, TokenId merged) {
    merges_[key_of(first, second)] = Merge{count_++, merged};
}

const Bpe::Merge *Bpe::find(TokenId first, TokenId second) const {
    const auto found = merges_.find(key_of(first, second));
    return found == merges_.end() ? nullptr : &found->second;
}

std::vector<TokenId> Bpe::merged(const std::vector<TokenId> &symbols) const {
    std::vector<Symbol> word;
    for (std::size_t i = 0; i < symbols.size(); ++i)
        word.push_back({symbols[i], i == 0 ? NONE : i - 1, i + 1 == symbols.size() ? NONE : i + 1});
    std::priority_queue<Candidate> candidates;
    const auto consider = [&](std::size_t at) {
        if (at == NONE || word[at].after == NONE) return;
        if (const Merge *merge = find(word[at].id, word[word[at].after].id))
            candidates.push({merge->rank, at, merge->merged});
    };
    for (std::size_t at = 0; at < word.size(); ++at) consider(at);
    while (!candidates.empty()) {
        const Candidate best = candidates.top();
        candidates.pop();
        Symbol &left = word[best.at];
        if (left.gone || left.after == NONE) continue;
        Symbol &right = word[left.after];
        const Merge *now = find(left.id, right.id);  // one of the two may have been merged since
        if (now == nullptr || now->merged != best.merged) continue;
        left.id = best.merged;
        left.after = right.after;
        right.gone = true;
        if (right.after != NONE) word[right.after].before = best.at;
        consider(left.before);
        consider(best.at);
    }
    std::vector<TokenId> ids;
    for (const Symbol &symbol : word)
        if (!symbol.gone) ids.push_back(symbol.id);
    return ids;
}

}  // namespace ldm::runtime
