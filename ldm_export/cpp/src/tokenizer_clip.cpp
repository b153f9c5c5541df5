#include "tokenizer_clip.hpp"

#include "error.hpp"
#include "tokenizer_clip_files.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <set>

namespace ldm::runtime {

namespace {

constexpr std::u32string_view SPECIAL[] = {U"<|startoftext|>", U"<|endoftext|>"};
constexpr std::u32string_view CONTRACTIONS[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};
constexpr const char *END_OF_WORD = "</w>";
constexpr std::size_t LONGEST_WRITTEN_OUT = 1 << 20;  // characters; tokens with one another in their names could make it endless

// The printable characters that stand for bytes.
std::array<char32_t, 256> byte_alphabet() {
    std::array<char32_t, 256> alphabet{};
    char32_t hidden = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
        const bool visible = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
        alphabet[byte] = visible ? byte : hidden++;
    }
    return alphabet;
}

std::u32string normalised(const std::u32string &text) {
    std::u32string spaced;
    for (const char32_t c : nfc(text)) {
        if (!is_space(c))
            spaced += c;
        else if (spaced.empty() || spaced.back() != U' ')
            spaced += U' ';
    }
    return lower(spaced);
}

bool is_other(char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); }

bool starts_with(std::u32string_view text, std::u32string_view start) { return text.substr(0, start.size()) == start; }

// How many characters the word at the start of a text has.
std::size_t word_length(std::u32string_view text) {
    for (const std::u32string_view ending : CONTRACTIONS)
        if (starts_with(text, ending)) return ending.size();
    if (is_number(text[0])) return 1;
    const auto matches = is_letter(text[0]) ? is_letter : is_other;
    return static_cast<std::size_t>(std::find_if_not(text.begin(), text.end(), matches) - text.begin());
}

}  // namespace

ClipTokenizer::ClipTokenizer(const TokenizerFiles &folder) {
    const ClipFiles files = read_clip_files(folder);
    max_length_ = files.max_length;
    for (const auto &[token, id] : files.vocabulary) texts_.emplace(id, token);
    const auto id_of = [&](const AddedToken &token) {
        for (const auto &[id, added] : files.added)
            if (added.content == token.content) return id;
        const auto found = files.vocabulary.find(token.content);
        if (found == files.vocabulary.end()) folder.bad("the vocabulary", "has no '" + token.content + "', a special token");
        return found->second;
    };
    bos_ = id_of(files.named[BOS]), eos_ = id_of(files.named[EOS]);
    pad_ = id_of(files.named[PAD]), unk_ = id_of(files.named[UNK]);

    const std::array<char32_t, 256> alphabet = byte_alphabet();
    for (std::size_t byte = 0; byte < 256; ++byte) {
        const std::string symbol = encoded({&alphabet[byte], 1});
        const auto inside = files.vocabulary.find(symbol), last = files.vocabulary.find(symbol + END_OF_WORD);
        bytes_[byte] = inside == files.vocabulary.end() ? unk_ : inside->second;
        last_bytes_[byte] = last == files.vocabulary.end() ? unk_ : last->second;
    }
    const auto id = [&](const std::string &token) { return files.vocabulary.at(token); };
    for (const auto &[first, second] : files.merges) bpe_.add_merge(id(first), id(second), id(first + second));

    added_ = AddedTokens(files.in_order, files.vocabulary, normalised);
    for (const auto &[content, number] : added_.ids()) texts_.emplace(number, content);
    for (const auto &[number, token] : files.added)
        if (const TokenId actual = added_.ids().at(token.content); actual != number)
            folder.bad("the added tokens",
                       join("give '", token.content, "' the id ", number, "; by the vocabulary it is ", actual));
    std::set<std::string> contents;
    for (const auto &[_, token] : files.added) contents.insert(token.content);
    for (const auto &[number, token] : files.added) {
        std::string vectors = token.content, next;
        for (std::size_t k = 1; contents.count(next = join(token.content, "_", k)) != 0; ++k) vectors += " " + next;
        if (vectors != token.content) written_out_[number] = {decoded(token.content), decoded(vectors)};
    }
}

std::vector<TokenId> ClipTokenizer::operator()(std::string_view prompt, const Warn &warn) const {
    std::vector<TokenId> ids = all(prompt);
    cut(ids, warn);
    return framed(std::move(ids));
}

std::vector<TokenId> ClipTokenizer::all(std::string_view prompt) const {
    if (!is_utf8(prompt)) throw InputError("A prompt is not UTF-8 text. Convert it.");
    return body(written_out(decoded(prompt)));
}

void ClipTokenizer::cut(std::vector<TokenId> &ids, const Warn &warn) const {
    const std::size_t room = max_length_ - 2;
    if (ids.size() <= room) return;
    warn(join("The prompt has ", ids.size(), " tokens; this model reads ", room, ". Cut off: '", text_of(ids, room),
              "'. Shorten the prompt."));
    ids.resize(room);
}

std::vector<TokenId> ClipTokenizer::framed(std::vector<TokenId> ids) const {
    ids.insert(ids.begin(), bos_);
    ids.push_back(eos_);
    ids.resize(max_length_, pad_);
    return ids;
}

// Replace each distinct token of several vectors, in the order in which the prompt has them, wherever the text has it.
std::u32string ClipTokenizer::written_out(std::u32string prompt) const {
    if (written_out_.empty()) return prompt;
    std::set<TokenId> seen;
    for (const TokenId id : body(prompt)) {
        const auto found = written_out_.find(id);
        if (found == written_out_.end() || !seen.insert(id).second) continue;
        const auto &[token, vectors] = found->second;
        std::size_t count = 0;
        for (std::size_t at = 0; (at = prompt.find(token, at)) != std::u32string::npos; at += token.size()) ++count;
        if (prompt.size() + count * (vectors.size() - token.size()) > LONGEST_WRITTEN_OUT)
            throw InputError(join("The prompt's tokens of several vectors are written out to more than ", LONGEST_WRITTEN_OUT,
                                  " characters. Shorten the prompt."));
        std::u32string text;
        std::size_t done = 0;
        for (std::size_t at; (at = prompt.find(token, done)) != std::u32string::npos; done = at + token.size())
            text.append(prompt, done, at - done).append(vectors);
        prompt = text.append(prompt, done, prompt.size() - done);
    }
    return prompt;
}

std::vector<TokenId> ClipTokenizer::body(const std::u32string &prompt) const {
    std::vector<TokenId> ids;
    for (const AddedTokens::Part &raw : added_.parts_of_raw(prompt)) {
        if (raw.id != AddedTokens::NONE) {
            ids.push_back(raw.id);
            continue;
        }
        const std::u32string text = normalised(prompt.substr(raw.start, raw.stop - raw.start));
        for (const AddedTokens::Part &part : added_.parts_of_normalised(text)) {
            if (part.id != AddedTokens::NONE)
                ids.push_back(part.id);
            else
                append_words(text.substr(part.start, part.stop - part.start), ids);
        }
    }
    return ids;
}

void ClipTokenizer::append_words(const std::u32string &text, std::vector<TokenId> &ids) const {
    for (std::u32string_view left = text; !left.empty();) {
        const auto special = std::find_if(std::begin(SPECIAL), std::end(SPECIAL),
                                          [&](std::u32string_view token) { return starts_with(left, token); });
        if (special != std::end(SPECIAL)) {  // written out, and not cut out: three words
            append_word(special->substr(0, 2), ids);
            append_word(special->substr(2, special->size() - 4), ids);
            append_word(special->substr(special->size() - 2), ids);
            left.remove_prefix(special->size());
        } else if (is_space(left[0])) {
            left.remove_prefix(1);
        } else {
            const std::size_t length = word_length(left);
            append_word(left.substr(0, length), ids);
            left.remove_prefix(length);
        }
    }
}

void ClipTokenizer::append_word(std::u32string_view word, std::vector<TokenId> &ids) const {
    const std::string utf8 = encoded(word);
    std::vector<TokenId> symbols;
    for (const char byte : utf8) symbols.push_back(bytes_[static_cast<unsigned char>(byte)]);
    symbols.back() = last_bytes_[static_cast<unsigned char>(utf8.back())];
    const std::vector<TokenId> merged = bpe_.merged(symbols);
    ids.insert(ids.end(), merged.begin(), merged.end());
}

std::string ClipTokenizer::text_of(const std::vector<TokenId> &ids, std::size_t from) const {
    static const std::array<char32_t, 256> alphabet = byte_alphabet();
    std::string text;
    for (std::size_t i = from; i < ids.size(); ++i) {
        std::string token = texts_.at(ids[i]);
        const bool ends = token.size() > 4 && token.compare(token.size() - 4, 4, END_OF_WORD) == 0;
        if (ends) token.resize(token.size() - 4);
        for (const char32_t c : decoded(token)) {
            const auto byte = std::find(alphabet.begin(), alphabet.end(), c);
            text += byte == alphabet.end() ? encoded({&c, 1}) : std::string(1, static_cast<char>(byte - alphabet.begin()));
        }
        if (ends && i + 1 < ids.size()) text += ' ';
    }
    return encoded(decoded(text));
}

}  // namespace ldm::runtime
