#include "pre_tokenizers.hpp"

#include "error.hpp"
#include "normalizers.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <set>

namespace ldm::runtime {

namespace {

constexpr char32_t SPACE = U'\u2581';  // how vocabularies of SentencePiece write a space

std::vector<Piece> split_at_spaces(const Piece &piece) {
    std::vector<Piece> words;
    for (std::size_t start = 0, stop; start < piece.text.size(); start = stop + 1) {
        for (stop = start; stop < piece.text.size() && !is_space(piece.text[stop]);) ++stop;
        if (start < stop) words.push_back(piece.part(start, stop));
    }
    return words;
}

// Each match ends a word, and one right behind another is a word of its own.
std::vector<Piece> split_behind(const Piece &piece, const std::u32string &pattern) {
    std::vector<Piece> words;
    std::size_t begun = 0;  // where the word is that a match would end
    const auto match = [&](std::size_t, std::size_t stop) {
        words.push_back(piece.part(begun, stop));
        begun = stop;
    };
    search(piece.text, pattern, match, [](std::size_t, std::size_t) {});
    if (begun < piece.text.size()) words.push_back(piece.part(begun, piece.text.size()));
    return words;
}

// Each mark of a space begins a word.
std::vector<Piece> split_before_spaces(const Piece &piece) {
    std::vector<Piece> words;
    std::size_t start = 0;
    for (std::size_t at = 1; at <= piece.text.size(); ++at) {
        if (at < piece.text.size() && piece.text[at] != SPACE) continue;
        words.push_back(piece.part(start, at));
        start = at;
    }
    return words;
}

PreTokenizer metaspace_of(const Json &part) {
    static const std::set<std::string> SCHEMES{"always", "first", "never"};
    const Json &mark = part["replacement"], &scheme = part["prepend_scheme"];
    if (!mark.is(Kind::text) || decoded(mark.text()) != std::u32string(1, SPACE) || !scheme.is(Kind::text) ||
        SCHEMES.count(scheme.text()) == 0)
        throw MalformedError("has a Metaspace that is not with \u2581, or prepends it in an unknown way");
    const bool splits = need(part, "split", Kind::boolean).boolean();
    const bool always = scheme.text() == "always", first = scheme.text() == "first";
    return [=](Piece piece) {
        std::replace(piece.text.begin(), piece.text.end(), U' ', SPACE);
        const bool begins = always || (first && piece.leading > 0);
        if (begins && piece.text.front() != SPACE) {
            piece.text.insert(piece.text.begin(), SPACE);
            if (piece.leading > 0) ++piece.leading;
        }
        return splits ? split_before_spaces(piece) : std::vector<Piece>{piece};
    };
}

PreTokenizer pre_tokenizer_of(const Json &part) {
    const std::string &kind = part["type"].text();
    if (kind == "WhitespaceSplit") return split_at_spaces;
    if (kind == "Metaspace") return metaspace_of(part);
    if (kind == "Split") {
        const std::u32string pattern = pattern_of(part["pattern"]);
        const Json &behaviour = part["behavior"], &invert = part["invert"];
        if (!behaviour.is(Kind::text) || behaviour.text() != "MergedWithPrevious" || !invert.is(Kind::boolean) ||
            invert.boolean())
            throw MalformedError("has a Split that is not MergedWithPrevious");
        return [=](const Piece &piece) { return split_behind(piece, pattern); };
    }
    throw MalformedError(join("has the pre_tokenizer ", short_repr(kind), ", which is not read here"));
}

}  // namespace

std::vector<PreTokenizer> pre_tokenizers_of(const Json &part) {
    std::vector<PreTokenizer> found;
    for (const Json &each : sequence_of(part, "pretokenizers")) found.push_back(pre_tokenizer_of(each));
    return found;
}

}  // namespace ldm::runtime
