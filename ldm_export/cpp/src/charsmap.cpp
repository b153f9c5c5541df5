#include "charsmap.hpp"

#include "json.hpp"
#include "unicode.hpp"

namespace ldm::runtime {

namespace {

constexpr std::size_t LONGEST_CLUSTER = 5;  // bytes of one that is looked up whole
constexpr std::size_t BLOCK = 256;          // units in which a node's children are
constexpr std::uint32_t LABEL = 0x800000FF, VALUE = 0x7FFFFFFF;

bool has_leaf(std::uint32_t unit) { return (unit >> 8 & 1) != 0; }
std::size_t offset_of(std::uint32_t unit) { return static_cast<std::size_t>(unit >> 10) << ((unit & 512) >> 6); }

// None where it is not base64 as it is written, padding included.
std::optional<std::string> decoded_base64(std::string_view text) {
    constexpr std::string_view ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (text.size() % 4 != 0) return std::nullopt;
    const std::size_t padding = text.empty() || text.back() != '=' ? 0 : text[text.size() - 2] == '=' ? 2 : 1;
    std::string data;
    data.reserve(text.size() / 4 * 3);
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const std::size_t digit = i + padding < text.size() ? ALPHABET.find(text[i]) : 0;
        if (digit == std::string_view::npos) return std::nullopt;
        bits = bits << 6 | static_cast<std::uint32_t>(digit);
        if (i % 4 != 3) continue;
        for (const int shift : {16, 8, 0}) data += static_cast<char>(bits >> shift & 0xFF);
    }
    for (std::size_t i = 0; i < padding; ++i) {
        if (data.back() != '\0') return std::nullopt;
        data.pop_back();
    }
    return data;
}

std::uint32_t little_endian(std::string_view data, std::size_t at) {
    std::uint32_t value = 0;
    for (std::size_t i = 4; i > 0; --i) value = value << 8 | static_cast<unsigned char>(data[at + i - 1]);
    return value;
}

// What comes of characters: each of which `from` is replaced by `to`. How many stand for the prompt's first one is counted
// as `tokenizers` does: a character that is added is where the one before it is, and what is removed is of the one before.
class Replacements {
  public:
    void add(std::size_t from, std::u32string_view to) {
        for (std::size_t i = 0; i < to.size(); ++i) {
            text += to[i];
            consumed_.push_back(i < from ? 1 : 0);
        }
        if (to.size() < from && !consumed_.empty()) consumed_.back() += from - to.size();
    }

    std::size_t leading(std::size_t before) const {
        std::size_t count = 0, at = 0;
        for (const std::size_t consumed : consumed_) {
            const bool is_added = consumed == 0;
            if ((is_added && at > 0 ? at - 1 : at) >= before) break;
            at += consumed;
            ++count;
        }
        return count;
    }

    std::u32string text;

  private:
    std::vector<std::size_t> consumed_;  // by character, how many there were in its place
};

}  // namespace

Charsmap::Charsmap(const std::string &base64) {
    const std::optional<std::string> data = decoded_base64(base64);
    if (!data) throw MalformedError("has a precompiled_charsmap that is not base64");
    const std::size_t size = data->size() < 4 ? 0 : little_endian(*data, 0);
    if (size == 0 || size % (4 * BLOCK) != 0 || data->size() - 4 < size || data->size() - 4 == size || data->back() != '\0')
        throw MalformedError("has a precompiled_charsmap of a size that none has");
    texts_ = data->substr(4 + size);
    if (!is_utf8(texts_)) throw MalformedError("has a precompiled_charsmap whose texts are not UTF-8");
    for (std::size_t at = 4; at < 4 + size; at += 4) trie_.push_back(little_endian(*data, at));
    check();
}

// Walk the whole trie once, so that `find` need not look where it goes.
void Charsmap::check() const {
    std::vector<bool> seen(trie_.size());
    std::vector<std::size_t> left{0};
    seen[0] = true;
    while (!left.empty()) {
        const std::size_t node = left.back();
        left.pop_back();
        const std::size_t block = node ^ offset_of(trie_[node]);
        if (block >= trie_.size()) throw MalformedError("has a precompiled_charsmap that leads out of itself");
        if (has_leaf(trie_[node])) {
            const std::size_t start = trie_[block] & VALUE;
            if (start >= texts_.size() || (texts_[start] & 0xC0) == 0x80)
                throw MalformedError("has a precompiled_charsmap that points out of its texts");
        }
        for (std::size_t label = 1; label < BLOCK; ++label) {
            const std::size_t child = block ^ label;
            if ((trie_[child] & LABEL) != label || seen[child]) continue;
            seen[child] = true;
            left.push_back(child);
        }
    }
}

std::optional<std::string_view> Charsmap::find(std::string_view key) const {
    std::size_t at = offset_of(trie_[0]);
    for (const char c : key) {
        const auto label = static_cast<unsigned char>(c);
        at ^= label;
        if (label == 0 || (trie_[at] & LABEL) != label) return std::nullopt;
        const bool ends = has_leaf(trie_[at]);
        at ^= offset_of(trie_[at]);
        if (ends) return std::string_view(texts_.c_str() + (trie_[at] & VALUE));
    }
    return std::nullopt;
}

std::size_t Charsmap::longest() const {
    std::size_t length = 0, longest = 0;
    for (const char32_t c : decoded(texts_)) {
        length = c == 0 ? 0 : length + 1;
        longest = std::max(longest, length);
    }
    return longest;
}

void Charsmap::apply(Piece &piece) const {
    Replacements done;
    const std::u32string_view text = piece.text;
    for (std::size_t at = 0, length; at < text.size(); at += length) {
        length = cluster_length(text.substr(at));
        const std::u32string_view cluster = text.substr(at, length);
        const std::string utf8 = encoded(cluster);
        const auto whole = utf8.size() <= LONGEST_CLUSTER ? find(utf8) : std::nullopt;
        if (whole) {
            done.add(length, decoded(*whole));
            continue;
        }
        for (const char32_t &c : cluster) {
            const auto one = find(encoded({&c, 1}));
            done.add(1, one ? decoded(*one) : std::u32string(1, c));
        }
    }
    piece.leading = done.leading(piece.leading);
    piece.text = std::move(done.text);
}

}  // namespace ldm::runtime
