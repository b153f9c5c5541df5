#include "tokenizer_json.hpp"

#include "error.hpp"
#include "manifest.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <set>

namespace ldm::runtime {

namespace {

constexpr const char *FILE_NAME = "tokenizer.json", *VERSION = "1.0", *LOWERCASE = "lowercase_prompts";

bool is_text(const Json &value, const char *wanted) { return value.is(Kind::text) && value.text() == wanted; }

AddedToken added_token_of(const Json &token) {
    if (!token["content"].is(Kind::text) || token["content"].text().empty())
        throw MalformedError(join("has the added token ", short_repr(token), "; an object with content is needed"));
    const auto flag = [&](const char *key) { return need(token, key, Kind::boolean).boolean(); };
    AddedToken found;
    found.content = token["content"].text();
    found.single_word = flag("single_word");
    found.lstrip = flag("lstrip");
    found.rstrip = flag("rstrip");
    found.normalized = flag("normalized");
    found.special = flag("special");
    return found;
}

// Of the texts of tokens, with spaces where SentencePiece marks them, and none at the ends.
std::string text_of(const std::vector<Token> &tokens, std::size_t from) {
    std::string joined;
    for (std::size_t i = from; i < tokens.size(); ++i) joined += tokens[i].text;
    std::u32string text = decoded(joined);
    std::replace(text.begin(), text.end(), U'\u2581', U' ');
    return encoded(python_strip(text));
}

}  // namespace

JsonTokenizer::JsonTokenizer(const TokenizerFiles &files) {
    const Json document = files.json(FILE_NAME);
    if (document.is_null()) files.bad(FILE_NAME, "is missing");
    try {
        read(document);
    } catch (const MalformedError &error) {
        files.bad(FILE_NAME, error.what());
    }
}

const char *JsonTokenizer::length_file() const { return FILE_NAME; }

void JsonTokenizer::read(const Json &document) {
    read_length_and_padding(document["truncation"], document["padding"]);
    if (document.object().count("version") != 0 && !is_text(document["version"], VERSION))
        throw MalformedError(join("has the version ", short_repr(document["version"]), "; ", VERSION, " is read"));
    if (document.object().count(LOWERCASE) != 0) lowercase_ = need(document, LOWERCASE, Kind::boolean).boolean();
    normalizers_ = normalizers_of(document["normalizer"]);
    pre_tokenizers_ = pre_tokenizers_of(document["pre_tokenizer"]);
    model_ = subwords_of(document["model"]);
    for (const auto &[token, id] : model_->vocabulary()) texts_.emplace(id, token);
    read_added_tokens(document);
    read_template(document["post_processor"]);
    if (before_.size() + after_.size() >= max_length_)
        throw MalformedError(join("has no room for text between its special tokens, in ", max_length_));
}

void JsonTokenizer::read_length_and_padding(const Json &truncation, const Json &padding) {
    if (!truncation.is(Kind::object) || !padding.is(Kind::object))
        throw MalformedError("lacks truncation or padding, which say how long a row of ids is");
    const Json &length = truncation["max_length"], &stride = truncation["stride"];
    if (!length.is(Kind::integer) || length.integer() < LEAST_TOKENS || length.integer() > LARGEST_SIZE)
        throw MalformedError(
            join("truncates to ", short_repr(length), "; ", LEAST_TOKENS, " to ", LARGEST_SIZE, " tokens are possible"));
    if (!is_text(truncation["direction"], "Right") || !stride.is(Kind::integer) || stride.integer() != 0)
        throw MalformedError("truncates other than on the right, with stride 0");
    const Json &strategy = padding["strategy"], &fixed = strategy["Fixed"];
    const bool is_same = fixed.is(Kind::integer) && fixed.integer() == length.integer() && strategy.object().size() == 1;
    if (!is_same || !padding["pad_to_multiple_of"].is_null())
        throw MalformedError(join("pads to ", short_repr(strategy), " and truncates to ", length.integer(),
                                  "; rows are of one length"));
    pads_left_ = is_text(padding["direction"], "Left");
    if ((!pads_left_ && !is_text(padding["direction"], "Right")) || !is_id(padding["pad_id"]))
        throw MalformedError("pads with no id, or neither on the left nor on the right");
    max_length_ = static_cast<std::size_t>(length.integer());
    pad_ = padding["pad_id"].integer();
}

// Each must have the id that it gets when they are added in order: of the vocabulary, or the next one.
void JsonTokenizer::read_added_tokens(const Json &document) {
    if (document.object().count("added_tokens") == 0) return;
    const Json &tokens = document["added_tokens"];
    if (!tokens.is(Kind::array)) throw MalformedError("has added_tokens that are no list");
    const Vocabulary &vocabulary = model_->vocabulary();
    const auto size = static_cast<TokenId>(vocabulary.size());
    const auto is_behind = [=](const auto &item) { return item.second >= size; };
    const bool has_gaps = std::any_of(vocabulary.begin(), vocabulary.end(), is_behind);
    std::vector<AddedToken> found;
    std::set<std::string> contents;
    std::set<std::u32string> normalised;
    bool takes_space = false, is_space_there = false;
    TokenId following = size;
    for (const Json &token : tokens.array()) {
        found.push_back(added_token_of(token));
        const std::string &content = found.back().content;
        if (!contents.insert(content).second) throw MalformedError(join("adds ", short_repr(content), " twice"));
        const auto known = vocabulary.find(content);
        const TokenId expected = known == vocabulary.end() ? following++ : known->second;
        if (!token["id"].is(Kind::integer) || token["id"].integer() != expected)
            throw MalformedError(join("gives the added token ", short_repr(content), " the id ", short_repr(token["id"]),
                                      ", not ", expected));
        if (known == vocabulary.end() && has_gaps)
            throw MalformedError("has ids in its vocabulary that are not the first numbers");
        texts_.emplace(expected, content);
        takes_space = takes_space || found.back().rstrip;
        is_space_there = is_space_there || (!found.back().is_normalized() && is_space(decoded(content)[0]));
    }
    const auto normalise_token = [&](const std::u32string &content) {
        Piece piece{content, 0};
        normalise(piece);
        if (piece.text.empty() || !normalised.insert(piece.text).second)
            throw MalformedError("adds tokens that are the same, or nothing, in normalised text");
        is_space_there = is_space_there || is_space(piece.text[0]);
        return piece.text;
    };
    added_ = AddedTokens(found, vocabulary, normalise_token);
    if (takes_space && is_space_there) throw MalformedError("adds a token of white space that another one takes along");
}

// Keep the ids of the special tokens before and after a text.
void JsonTokenizer::read_template(const Json &part) {
    if (part.is_null()) return;
    if (!is_text(part["type"], "TemplateProcessing"))
        throw MalformedError("has a post_processor that is no TemplateProcessing");
    std::size_t texts = 0;
    for (const Json &piece : need(part, "single", Kind::array).array()) {
        if (is_text(piece["Sequence"]["id"], "A")) {
            ++texts;
        } else if (piece["SpecialToken"].is(Kind::object)) {
            std::vector<TokenId> &side = texts > 0 ? after_ : before_;
            const std::vector<TokenId> ids = ids_of_special(piece["SpecialToken"]["id"], part["special_tokens"]);
            side.insert(side.end(), ids.begin(), ids.end());
        } else {
            throw MalformedError(join("has ", short_repr(piece), " in its template"));
        }
    }
    if (texts != 1) throw MalformedError(join("has a template with ", texts, " texts; one is needed"));
}

std::vector<TokenId> JsonTokenizer::ids_of_special(const Json &name, const Json &special_tokens) const {
    const Json &ids = name.is(Kind::text) ? special_tokens[name.text()]["ids"] : name["ids"];
    const auto is_known = [&](const Json &id) { return is_id(id) && texts_.count(id.integer()) != 0; };
    std::vector<TokenId> found;
    if (!name.is(Kind::text) || !ids.is(Kind::array) || !std::all_of(ids.array().begin(), ids.array().end(), is_known))
        throw MalformedError(join("has the special token ", short_repr(name), ", of which it has no ids"));
    for (const Json &id : ids.array()) found.push_back(id.integer());
    return found;
}

std::vector<TokenId> JsonTokenizer::operator()(std::string_view prompt, const Warn &warn) const {
    if (!is_utf8(prompt)) throw InputError("A prompt is not UTF-8 text. Convert it.");
    const std::u32string text = decoded(prompt);
    std::vector<Token> tokens = body(lowercase_ ? python_lower(python_strip(text)) : text);
    const std::size_t room = max_length_ - before_.size() - after_.size();
    if (tokens.size() > room) {
        warn(join("The prompt has ", tokens.size(), " tokens; this model reads ", room, ". Cut off: '",
                  text_of(tokens, room), "'. Shorten the prompt."));
        tokens.resize(room);
    }
    std::vector<TokenId> ids = before_;
    for (const Token &token : tokens) ids.push_back(token.id);
    ids.insert(ids.end(), after_.begin(), after_.end());
    if (!ids.empty() && (pads_left_ ? ids.front() : ids.back()) == pad_)
        throw InputError(join("The prompt ", pads_left_ ? "begins" : "ends", " with '", texts_.at(pad_),
                              "', which stands for no text. Leave it out."));
    ids.insert(pads_left_ ? ids.begin() : ids.end(), max_length_ - ids.size(), pad_);
    return ids;
}

void JsonTokenizer::normalise(Piece &piece) const {
    for (const Normalizer &normalizer : normalizers_) normalizer(piece);
}

std::vector<Token> JsonTokenizer::body(const std::u32string &prompt) const {
    std::vector<Token> tokens;
    const auto keep = [&](const AddedTokens::Part &part, const std::u32string &text) {
        const bool is_added = part.id != AddedTokens::NONE;
        if (is_added) tokens.push_back({part.id, encoded(text.substr(part.start, part.stop - part.start))});
        return is_added;
    };
    const Piece whole{prompt, 1};
    for (const AddedTokens::Part &raw : added_.parts_of_raw(prompt)) {
        if (keep(raw, prompt)) continue;
        Piece piece = whole.part(raw.start, raw.stop);
        normalise(piece);
        for (const AddedTokens::Part &part : added_.parts_of_normalised(piece.text))
            if (!keep(part, piece.text)) append(piece.part(part.start, part.stop), tokens);
    }
    return tokens;
}

void JsonTokenizer::append(Piece piece, std::vector<Token> &tokens) const {
    std::vector<Piece> words{std::move(piece)};
    for (const PreTokenizer &pre_tokenizer : pre_tokenizers_) {
        std::vector<Piece> finer;
        for (Piece &word : words)
            for (Piece &part : pre_tokenizer(std::move(word))) finer.push_back(std::move(part));
        words = std::move(finer);
    }
    for (const Piece &word : words) model_->append(word.text, tokens);
}

}  // namespace ldm::runtime
