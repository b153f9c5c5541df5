#include "tokenizer.hpp"

#include "error.hpp"
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

Tokenizer::Tokenizer(const std::string &folder, const ReadText &read) {
    const TokenizerFiles files = read_tokenizer_files(folder, read);
    const auto bad = [&](const std::string &what) {
        throw BundleError(join("Tokenizer folder ", folder, ": ", what, ". Export the bundle anew."));
    };
    max_length_ = files.max_length;
    for (const auto &[token, id] : files.vocabulary) texts_.emplace(id, token);
    const auto id_of = [&](const AddedToken &token) {
        for (const auto &[id, added] : files.added)
            if (added.content == token.content) return id;
        const auto found = files.vocabulary.find(token.content);
        if (found == files.vocabulary.end()) bad("the vocabulary has no '" + token.content + "', a special token");
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

    register_tokens(files.in_order);
    for (const auto &[number, token] : files.added)
        if (const TokenId actual = added_.at(token.content); actual != number)
            bad(join("the added tokens give '", token.content, "' the id ", number, "; by the vocabulary it is ", actual));
    std::set<std::string> contents;
    for (const auto &[_, token] : files.added) contents.insert(token.content);
    for (const auto &[number, token] : files.added) {
        std::string vectors = token.content, next;
        for (std::size_t k = 1; contents.count(next = join(token.content, "_", k)) != 0; ++k) vectors += " " + next;
        if (vectors != token.content) written_out_[number] = {decoded(token.content), decoded(vectors)};
    }
}

// As `tokenizers` does it: of tokens with equal content the last one's flags hold, and the first special one's place.
void Tokenizer::register_tokens(const std::vector<AddedToken> &tokens) {
    const auto vocabulary_size = static_cast<TokenId>(texts_.size());
    std::unordered_map<std::string, TokenId> known;
    for (const auto &[id, text] : texts_) known.emplace(text, id);
    std::vector<const AddedToken *> places;
    std::set<std::string> special;
    for (const AddedToken &token : tokens)
        if (token.special && special.insert(token.content).second) places.push_back(&token);
    TokenId largest = -1;
    for (const AddedToken &token : tokens) {
        TokenId id;
        if (const auto before = added_.find(token.content); before != added_.end())
            id = before->second;
        else if (const auto there = known.find(token.content); there != known.end())
            id = there->second;
        else
            id = largest >= vocabulary_size || vocabulary_size == 0 ? largest + 1 : vocabulary_size;
        largest = std::max(largest, id);
        added_[token.content] = id;
        flags_[id] = token;
        texts_.emplace(id, token.content);
        if (special.count(token.content) == 0) places.push_back(&token);
    }
    for (const AddedToken *token : places) {
        const std::u32string content = decoded(token->content);
        if (token->is_normalized())
            normalized_.push_back({normalised(content), added_.at(token->content)});
        else
            raw_.push_back({content, added_.at(token->content)});
    }
}

std::vector<TokenId> Tokenizer::operator()(std::string_view prompt, const Warn &warn) const {
    if (!is_utf8(prompt)) throw InputError("A prompt is not UTF-8 text. Convert it.");
    std::vector<TokenId> ids = body(written_out(decoded(prompt)));
    const std::size_t room = max_length_ - 2;
    if (ids.size() > room) {
        warn(join("The prompt has ", ids.size(), " tokens; this model reads ", room, ". Cut off: '", text_of(ids, room),
                  "'. Shorten the prompt."));
        ids.resize(room);
    }
    ids.insert(ids.begin(), bos_);
    ids.push_back(eos_);
    ids.resize(max_length_, pad_);
    return ids;
}

// Replace each distinct token of several vectors, in the order in which the prompt has them, wherever the text has it.
std::u32string Tokenizer::written_out(std::u32string prompt) const {
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

std::vector<TokenId> Tokenizer::body(const std::u32string &prompt) const {
    std::vector<TokenId> ids;
    split(prompt, raw_, ids, [&](const std::u32string &rest) {
        split(normalised(rest), normalized_, ids, [&](const std::u32string &text) { append_words(text, ids); });
    });
    return ids;
}

// Cut the patterns out, from left to right, of those that begin at one place the longest; `rest` gets what is between.
void Tokenizer::split(const std::u32string &text, const std::vector<Pattern> &patterns, std::vector<TokenId> &ids,
                      const std::function<void(const std::u32string &)> &rest) const {
    std::size_t done = 0;  // up to here the text has been given away
    for (std::size_t at = 0; at < text.size();) {
        const Pattern *longest = nullptr;
        for (const Pattern &pattern : patterns)
            if (!pattern.text.empty() && text.compare(at, pattern.text.size(), pattern.text) == 0 &&
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
        if (done < start) rest(text.substr(done, start - done));
        ids.push_back(longest->id);
        done = stop;
    }
    if (done < text.size()) rest(text.substr(done));
}

void Tokenizer::append_words(const std::u32string &text, std::vector<TokenId> &ids) const {
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

void Tokenizer::append_word(std::u32string_view word, std::vector<TokenId> &ids) const {
    const std::string utf8 = encoded(word);
    std::vector<TokenId> symbols;
    for (const char byte : utf8) symbols.push_back(bytes_[static_cast<unsigned char>(byte)]);
    symbols.back() = last_bytes_[static_cast<unsigned char>(utf8.back())];
    const std::vector<TokenId> merged = bpe_.merged(symbols);
    ids.insert(ids.end(), merged.begin(), merged.end());
}

std::string Tokenizer::text_of(const std::vector<TokenId> &ids, std::size_t from) const {
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
