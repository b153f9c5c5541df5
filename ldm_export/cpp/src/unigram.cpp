#include "unigram.hpp"

#include "error.hpp"
#include "normalizers.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace ldm::runtime {

namespace {

constexpr double UNKNOWN_PENALTY = 10;
constexpr int LARGEST_POWER = 308, LEAST_SCIENTIFIC = 16;

double power_of_ten(int exponent) {
    const std::string text = join("1e", exponent);
    double power = 0;
    std::from_chars(text.data(), text.data() + text.size(), power);
    return power;
}

// A score as `tokenizers` reads it from Python's text of it: the digits as a whole number, times or over a power of ten,
// both rounded. The last bit tells which way is taken of two with the same tokens in another order.
double as_tokenizers_reads(double score) {
    char text[64];
    const char *end = std::to_chars(text, text + sizeof text, std::abs(score), std::chars_format::scientific).ptr;
    const char *e = std::find(static_cast<const char *>(text), end, 'e');
    int exponent = 0;
    std::from_chars(e + (e[1] == '+' ? 2 : 1), end, exponent);
    std::uint64_t digits = 0;
    for (const char *c = text; c != e; ++c)
        if (*c != '.') digits = digits * 10 + static_cast<std::uint64_t>(*c - '0');
    int power = exponent - std::max(static_cast<int>(e - text) - 2, 0);
    for (; power >= 0 && exponent < LEAST_SCIENTIFIC; --power) digits *= 10;  // a whole number has ".0" at its end
    auto value = static_cast<double>(digits);
    if (power < -LARGEST_POWER) {
        value /= power_of_ten(LARGEST_POWER);
        power += LARGEST_POWER;
    }
    value = power < 0 ? value / power_of_ten(-power) : value * power_of_ten(power);
    return std::signbit(score) ? -value : value;
}

std::size_t length_of_character(char first) {
    const auto lead = static_cast<unsigned char>(first);
    return lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
}

}  // namespace

Unigram::Unigram(const Json &model) {
    need(model, "byte_fallback", Kind::boolean);
    read_entries(need(model, "vocab", Kind::array));
    read_unknown(model);
    read_byte_fallback(model);
}

void Unigram::read_entries(const Json &vocabulary) {
    double least = std::numeric_limits<double>::infinity();
    for (const Json &entry : vocabulary.array()) {
        const bool is_pair = entry.is(Kind::array) && entry.array().size() == 2;
        if (!is_pair || !entry.array()[0].is(Kind::text) || entry.array()[0].text().empty())
            throw MalformedError(join("has ", short_repr(entry), " in its vocabulary; a token and its score are needed"));
        const Json &token = entry.array()[0], &score = entry.array()[1];
        if (!score.is(Kind::number) || !std::isfinite(score.number()))
            throw MalformedError(
                join("has the score ", short_repr(score), " of ", short_repr(token), "; a number is needed"));
        const auto [place, is_new] = vocabulary_.emplace(token.text(), static_cast<TokenId>(vocabulary_.size()));
        if (!is_new) throw MalformedError("has a token twice in its vocabulary");
        entries_.push_back({place->first, place->second, as_tokenizers_reads(score.number())});
        if (!std::isfinite(entries_.back().score)) throw MalformedError("has a score that tokenizers refuses");
        least = std::min(least, entries_.back().score);
    }
    std::sort(entries_.begin(), entries_.end(), [](const Entry &a, const Entry &b) { return a.text < b.text; });
    unknown_score_ = least - UNKNOWN_PENALTY;
}

void Unigram::read_unknown(const Json &model) {
    const Json &unknown = model["unk_id"];
    if (!is_id(unknown) || unknown.integer() >= static_cast<std::int64_t>(vocabulary_.size()))
        throw MalformedError(
            join("has the unk_id ", short_repr(unknown), "; one of its ", vocabulary_.size(), " tokens is needed"));
    unknown_ = unknown.integer();
}

// The best way to each place of a word, from what is known of the places before it (Viterbi's algorithm).
std::vector<Unigram::Way> Unigram::ways(std::string_view word) const {
    std::vector<Way> found(word.size() + 1);
    for (std::size_t at = 0, length; at < word.size(); at += length) {
        length = length_of_character(word[at]);
        const auto consider = [&, at](std::size_t stop, double score, TokenId id) {
            score += found[at].score;
            if (found[stop].from == NOWHERE || score > found[stop].score) found[stop] = {score, at, id};
        };
        bool is_known = false;  // whether the character alone is a token
        auto first = entries_.begin(), last = entries_.end();  // those that begin as the word goes on from here
        for (std::size_t k = 0; at + k < word.size() && first != last; ++k) {
            const auto byte = static_cast<unsigned char>(word[at + k]);
            const auto before = [k](const Entry &entry, int wanted) {
                return (k < entry.text.size() ? static_cast<unsigned char>(entry.text[k]) : -1) < wanted;
            };
            first = std::lower_bound(first, last, byte, before);
            last = std::lower_bound(first, last, byte + 1, before);
            if (first == last || first->text.size() != k + 1) continue;
            consider(at + k + 1, first->score, first->id);
            is_known = is_known || k + 1 == length;
        }
        if (!is_known) consider(at + length, unknown_score_, unknown_);
    }
    return found;
}

void Unigram::append(const std::u32string &word, std::vector<Token> &tokens) const {
    const std::string utf8 = encoded(word);
    const std::vector<Way> best = ways(utf8);
    std::vector<std::size_t> starts;  // of pieces, from the end; neighbours that are unknown are one
    bool is_unknown = false;
    for (std::size_t stop = utf8.size(); stop > 0; stop = best[stop].from) {
        const Way &way = best[stop];
        if (is_unknown && way.id == unknown_) starts.pop_back();
        starts.push_back(way.from);
        is_unknown = way.id == unknown_;
    }
    for (std::size_t i = starts.size(); i > 0; --i)
        append_piece(utf8.substr(starts[i - 1], (i > 1 ? starts[i - 2] : utf8.size()) - starts[i - 1]), tokens);
}

void Unigram::append_piece(const std::string &piece, std::vector<Token> &tokens) const {
    if (const auto found = vocabulary_.find(piece); found != vocabulary_.end())
        tokens.push_back({found->second, piece});
    else if (bytes_ != nullptr)
        for (const char byte : piece) tokens.push_back((*bytes_)[byte]);
    else
        tokens.push_back({unknown_, piece});
}

}  // namespace ldm::runtime
