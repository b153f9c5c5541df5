#include "unicode.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

namespace ldm::runtime {

namespace {

struct Range {
    char32_t first, last;
};
template <int Longest>
struct Mapping {
    char32_t from;
    char32_t to[Longest];  // zeros at the end are no characters
};
struct Pair {
    char32_t first, second, composed;
};
struct CombiningClass {
    char32_t c;
    int value;
};
struct Traits {
    char32_t first, last;
    int value;
};

// What the rules for grapheme clusters ask of a character: see tools/unicode_tables.py. The last two are not in its table.
enum Trait {
    EXTENDING = 1,  // goes on with what is before it
    MARK = 2,       // of those, what may be between a pictograph and a joiner
    PREPENDED = 4,  // what is behind it goes on with it
    CONTROL = 8,
    HANGUL_L = 16,
    HANGUL_V = 32,
    HANGUL_T = 64,
    PICTOGRAPH = 128,
    CONSONANT = 256,  // of scripts that join consonants
    LINKER = 512,     // what joins them
    BETWEEN = 1024,   // and what may be beside that
    HANGUL_LV = 2048,
    HANGUL_LVT = 4096,
};

#include "unicode_tables.inc"

// Hangul syllables are made by arithmetic (The Unicode Standard, section 3.12).
constexpr char32_t S_BASE = 0xAC00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7;
constexpr char32_t L_COUNT = 19, V_COUNT = 21, T_COUNT = 28, S_COUNT = L_COUNT * V_COUNT * T_COUNT;

constexpr char32_t REPLACEMENT = 0xFFFD, JOINER = 0x200D, SIGMA = 0x3A3, FINAL_SIGMA = 0x3C2;

template <std::size_t Size>
bool within(const Range (&ranges)[Size], char32_t c) {
    const auto found =
        std::lower_bound(std::begin(ranges), std::end(ranges), c, [](const Range &r, char32_t x) { return r.last < x; });
    return found != std::end(ranges) && found->first <= c;
}

template <int Longest, std::size_t Size>
bool append_mapped(const Mapping<Longest> (&table)[Size], char32_t c, std::u32string &out) {
    const auto found = std::lower_bound(std::begin(table), std::end(table), c,
                                        [](const Mapping<Longest> &row, char32_t x) { return row.from < x; });
    if (found == std::end(table) || found->from != c) return false;
    for (const char32_t to : found->to)
        if (to != 0) out += to;
    return true;
}

int combining_class(char32_t c) {
    const auto found = std::lower_bound(std::begin(COMBINING_CLASSES), std::end(COMBINING_CLASSES), c,
                                        [](const CombiningClass &row, char32_t x) { return row.c < x; });
    return found != std::end(COMBINING_CLASSES) && found->c == c ? found->value : 0;
}

// The code point that two become, or 0.
char32_t composed(char32_t first, char32_t second) {
    if (first - L_BASE < L_COUNT && second - V_BASE < V_COUNT)
        return S_BASE + ((first - L_BASE) * V_COUNT + (second - V_BASE)) * T_COUNT;
    if (first - S_BASE < S_COUNT && (first - S_BASE) % T_COUNT == 0 && second > T_BASE && second < T_BASE + T_COUNT)
        return first + (second - T_BASE);
    const auto key = std::make_pair(first, second);
    const auto found = std::lower_bound(std::begin(COMPOSED), std::end(COMPOSED), key, [](const Pair &row, auto wanted) {
        return std::make_pair(row.first, row.second) < wanted;
    });
    return found != std::end(COMPOSED) && std::make_pair(found->first, found->second) == key ? found->composed : 0;
}

std::u32string decomposed(std::u32string_view text) {
    std::u32string out;
    for (const char32_t c : text) {
        if (c - S_BASE < S_COUNT) {
            const char32_t s = c - S_BASE;
            out += L_BASE + s / (V_COUNT * T_COUNT);
            out += V_BASE + s % (V_COUNT * T_COUNT) / T_COUNT;
            if (s % T_COUNT != 0) out += T_BASE + s % T_COUNT;
        } else if (!append_mapped(DECOMPOSED, c, out)) {
            out += c;
        }
    }
    const auto by_class = [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); };
    for (auto start = out.begin(); start != out.end();) {  // runs of marks are put in order of their class
        const auto is_mark = [](char32_t c) { return combining_class(c) != 0; };
        start = std::find_if(start, out.end(), is_mark);
        const auto end = std::find_if_not(start, out.end(), is_mark);
        std::stable_sort(start, end, by_class);
        start = end;
    }
    return out;
}

int traits_of(char32_t c) {
    if (c - S_BASE < S_COUNT) return (c - S_BASE) % T_COUNT == 0 ? HANGUL_LV : HANGUL_LVT;
    const auto found = std::lower_bound(std::begin(GRAPHEMES), std::end(GRAPHEMES), c,
                                        [](const Traits &row, char32_t x) { return row.last < x; });
    return found != std::end(GRAPHEMES) && found->first <= c ? found->value : 0;
}

// Whether two characters are of one syllable.
bool is_syllable(int before, int after) {
    if ((before & HANGUL_L) != 0) return (after & (HANGUL_L | HANGUL_V | HANGUL_LV | HANGUL_LVT)) != 0;
    if ((before & (HANGUL_V | HANGUL_LV)) != 0) return (after & (HANGUL_V | HANGUL_T)) != 0;
    return (before & (HANGUL_T | HANGUL_LVT)) != 0 && (after & HANGUL_T) != 0;
}

// The code point at `at`, and its number of bytes; none, and one byte, where there is no UTF-8.
std::pair<char32_t, std::size_t> next_code_point(std::string_view text, std::size_t at) {
    constexpr auto NONE = std::make_pair(char32_t{0xFFFFFFFF}, std::size_t{1});
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(at);
    if (lead < 0x80) return {lead, 1};
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || at + length > text.size()) return NONE;
    char32_t c = lead & (0xFFu >> (length + 1));
    for (std::size_t i = 1; i < length; ++i) {
        if ((byte(at + i) & 0xC0) != 0x80) return NONE;
        c = c << 6 | (byte(at + i) & 0x3F);
    }
    const bool too_long = (length == 3 && c < 0x800) || (length == 4 && c < 0x10000);
    if (too_long || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return NONE;
    return {c, length};
}

}  // namespace

bool is_utf8(std::string_view text) {
    for (std::size_t at = 0; at < text.size();) {
        const auto [c, length] = next_code_point(text, at);
        if (c > 0x10FFFF) return false;
        at += length;
    }
    return true;
}

std::u32string decoded(std::string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const auto [c, length] = next_code_point(text, at);
        out += c > 0x10FFFF ? REPLACEMENT : c;
        at += length;
    }
    return out;
}

std::string encoded(std::u32string_view text) {
    std::string out;
    for (const char32_t c : text) {
        if (c < 0x80) {
            out += static_cast<char>(c);
            continue;
        }
        const int tail = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;  // bytes after the first
        out += static_cast<char>(static_cast<std::uint8_t>(0xFF00u >> (tail + 1)) | (c >> (6 * tail)));
        for (int i = tail - 1; i >= 0; --i) out += static_cast<char>(0x80 | (c >> (6 * i) & 0x3F));
    }
    return out;
}

bool is_letter(char32_t c) { return within(LETTERS, c); }
bool is_number(char32_t c) { return within(NUMBERS, c); }
bool is_space(char32_t c) { return within(SPACES, c); }
bool is_word_character(char32_t c) { return within(WORD_CHARACTERS, c); }

std::u32string lower(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (const char32_t c : text)
        if (!append_mapped(LOWER, c, out)) out += c;
    return out;
}

std::u32string_view python_strip(std::u32string_view text) {
    const auto is_stripped = [](char32_t c) { return within(PYTHON_SPACES, c); };
    while (!text.empty() && is_stripped(text.front())) text.remove_prefix(1);
    while (!text.empty() && is_stripped(text.back())) text.remove_suffix(1);
    return text;
}

std::u32string python_lower(std::u32string_view text) {
    const auto is_ignored = [](char32_t c) { return within(PYTHON_CASE_IGNORABLE, c); };
    const auto begins_cased = [=](auto from, auto to) {
        const auto found = std::find_if_not(from, to, is_ignored);
        return found != to && within(PYTHON_CASED, *found);
    };
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto before = std::make_reverse_iterator(text.begin() + i);
        if (text[i] == SIGMA && begins_cased(before, text.rend()) && !begins_cased(text.begin() + i + 1, text.end()))
            out += FINAL_SIGMA;
        else if (!append_mapped(PYTHON_LOWER, text[i], out))
            out += text[i];
    }
    return out;
}

std::size_t cluster_length(std::u32string_view text) {
    if (text.substr(0, 2) == U"\r\n") return 2;
    bool picture = false, joined = false;     // a pictograph and marks so far; and a joiner
    bool consonant = false, linked = false;   // a consonant and what may be beside a linker; and a linker
    int before = 0;
    std::size_t length = 0;
    for (const char32_t c : text) {
        const int own = traits_of(c);
        const bool goes_on = (own & EXTENDING) != 0 || (before & PREPENDED) != 0 || is_syllable(before, own) ||
                             (joined && (own & PICTOGRAPH) != 0) || (linked && (own & CONSONANT) != 0);
        if (length > 0 && (!goes_on || ((before | own) & CONTROL) != 0)) break;
        picture = (own & PICTOGRAPH) != 0 || (picture && !joined && ((own & MARK) != 0 || c == JOINER));
        joined = picture && c == JOINER;
        linked = consonant && (own & BETWEEN) != 0 && (linked || (own & LINKER) != 0);
        consonant = (own & CONSONANT) != 0 || (consonant && (own & BETWEEN) != 0);
        before = own;
        ++length;
    }
    return length;
}

std::u32string nfc(std::u32string_view text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0x300; })) return std::u32string(text);
    std::u32string out;
    std::size_t starter = std::u32string::npos;  // where the last character of class 0 is
    int previous = 0;                            // class of the character before, if it was not joined
    for (const char32_t c : decomposed(text)) {
        const int own = combining_class(c);
        const bool adjacent = starter != std::u32string::npos && starter + 1 == out.size();
        if (starter != std::u32string::npos && (adjacent || (previous != 0 && previous < own))) {
            if (const char32_t joined = composed(out[starter], c)) {
                out[starter] = joined;
                continue;
            }
        }
        if (own == 0) starter = out.size();
        previous = own;
        out += c;
    }
    return out;
}

}  // namespace ldm::runtime
