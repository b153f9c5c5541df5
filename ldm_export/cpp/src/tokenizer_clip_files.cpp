#include "tokenizer_clip_files.hpp"

#include "error.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace ldm::runtime {

namespace {

constexpr const char *END_OF_WORD = "</w>";
constexpr const char *CONFIG = "tokenizer_config.json";
constexpr std::size_t DEFAULT_MAX_LENGTH = 77;
constexpr double LONGEST = 1 << 20;  // transformers writes 10**30 for "no limit"

struct Named {
    const char *role, *token;
};
constexpr std::array<Named, 4> NAMED{{{"bos_token", "<|startoftext|>"},
                                      {"eos_token", "<|endoftext|>"},
                                      {"unk_token", "<|endoftext|>"},
                                      {"pad_token", "<|endoftext|>"}}};

bool is_empty(const Json &value) {  // what Python takes for false
    return value.is_null() || (value.is(Kind::text) && value.text().empty()) ||
           (value.is(Kind::object) && value.object().empty()) || (value.is(Kind::array) && value.array().empty()) ||
           (value.is(Kind::boolean) && !value.boolean()) || (value.is(Kind::number) && value.number() == 0);
}

std::optional<TokenId> id_of(const std::string &digits) {
    const bool decimal = !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos;
    return decimal && digits.size() < 10 ? std::optional<TokenId>(std::stoll(digits)) : std::nullopt;
}

class Reader {
  public:
    explicit Reader(const TokenizerFiles &files) : files_(files) {}

    ClipFiles read() const {
        const Json whole = json("tokenizer.json");
        Json config = json(CONFIG);
        if (config.is_null()) config = Json::Object();
        if (config.object().count("added_tokens_decoder") == 0)
            if (const Json special = json("special_tokens_map.json"); !special.is_null())
                for (const auto &[key, value] : special.object()) config.object().insert_or_assign(key, value);
        ClipFiles files;
        for (std::size_t role = 0; role < NAMED.size(); ++role) {
            const Json &value = config[NAMED[role].role];
            files.named[role] = token(NAMED[role].role, is_empty(value) ? Json(NAMED[role].token) : value, true);
        }
        read_vocabulary(whole, files);
        read_merges(whole, files);
        read_added(config, whole, files);
        read_extra(config, files);
        files.max_length = max_length(config);
        return files;
    }

  private:
    [[noreturn]] void bad(const std::string &name, const std::string &what) const { files_.bad(name, what); }
    Json json(const std::string &name) const { return files_.json(name); }

    void read_vocabulary(const Json &whole, ClipFiles &files) const {
        const char *name = whole.is_null() ? "vocab.json" : "tokenizer.json";
        Json vocabulary;
        if (whole.is_null()) {
            vocabulary = json(name);
            if (vocabulary.is_null()) bad(name, "is missing");
        } else {
            const Json &model = whole["model"], &suffix = model["end_of_word_suffix"];
            if (!suffix.is(Kind::text) || suffix.text() != END_OF_WORD)
                bad(name, join("is not CLIP's, which has a BPE model with end_of_word_suffix '", END_OF_WORD, "'"));
            vocabulary = model["vocab"];
        }
        if (!vocabulary.is(Kind::object)) bad(name, "lacks the vocabulary or the merges");
        std::set<TokenId> numbers;
        for (const auto &[token, number] : vocabulary.object()) {
            if (!number.is(Kind::integer) || number.integer() < 0 || number.integer() > INT32_MAX)
                bad(name, join("gives '", token, "' the id ", number.dump(), "; ids are whole numbers from 0"));
            if (!numbers.insert(number.integer()).second) bad(name, "gives two tokens the same id");
            files.vocabulary.emplace(token, number.integer());
        }
    }

    void read_merges(const Json &whole, ClipFiles &files) const {
        const char *name = whole.is_null() ? "merges.txt" : "tokenizer.json";
        if (whole.is_null()) {
            const std::optional<std::string> content = files_.read(name);
            if (!content) bad(name, "is missing");
            const std::string &lines = *content;
            for (std::size_t start = 0, end; start < lines.size(); start = end + 1) {
                end = std::min(lines.find('\n', start), lines.size());
                std::string line = lines.substr(start, end - start);
                if (!line.empty() && line.back() == '\r' && end < lines.size()) line.pop_back();
                if (!line.empty() && line.rfind("#version", 0) != 0) add_merge(name, line, files);
            }
            return;
        }
        const Json &merges = whole["model"]["merges"];
        if (!merges.is(Kind::array)) bad(name, "lacks the vocabulary or the merges");
        for (const Json &merge : merges.array()) {
            if (merge.is(Kind::text)) {
                add_merge(name, merge.text(), files);
                continue;
            }
            const Json::Array pair = merge.is(Kind::array) ? merge.array() : Json::Array();
            if (pair.size() != 2 || !pair[0].is(Kind::text) || !pair[1].is(Kind::text))
                bad(name, join("has the merge ", merge.dump(), "; a merge is two tokens"));
            add_merge(name, pair[0].text(), pair[1].text(), files);
        }
    }

    void add_merge(const std::string &name, const std::string &line, ClipFiles &files) const {
        const std::size_t space = line.find(' ');
        if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
            bad(name, join("has the merge '", line, "'; a merge is two tokens"));
        add_merge(name, line.substr(0, space), line.substr(space + 1), files);
    }

    void add_merge(const std::string &name, const std::string &first, const std::string &second,
                   ClipFiles &files) const {
        for (const std::string &token : {first, second, first + second})
            if (files.vocabulary.count(token) == 0)
                bad(name, join("has the merge '", first, " ", second, "', but '", token, "' is not in the vocabulary"));
        files.merges.emplace_back(first, second);
    }

    // The tokens outside the merges; added_tokens_decoder makes the older places for them moot.
    void read_added(const Json &config, const Json &whole, ClipFiles &files) const {
        const auto add = [&](const char *name, const std::string &number, const Json &value) {
            const std::optional<TokenId> id = id_of(number);
            if (!id) bad(name, join("gives an added token the id ", number.empty() ? "that is none" : number, "; ids are whole numbers from 0"));
            files.added[*id] = token(name, value, false);
        };
        if (config.object().count("added_tokens_decoder") != 0) {
            const Json &decoder = config["added_tokens_decoder"];
            if (!decoder.is(Kind::object)) bad(CONFIG, join("has the added tokens ", decoder.dump(), "; an object is needed"));
            for (const auto &[number, value] : decoder.object()) add(CONFIG, number, value);
            return;
        }
        const char *name = "added_tokens.json or tokenizer.json";
        if (const Json older = json("added_tokens.json"); !older.is_null()) {
            for (const auto &[content, number] : older.object()) {
                const bool special = std::any_of(files.named.begin(), files.named.end(),
                                                 [&text = content](const AddedToken &t) { return t.content == text; });
                add(name, number.is(Kind::integer) ? number.dump() : "",
                    Json::Object{{"content", content}, {"special", special}, {"normalized", !special}});
            }
        }
        const Json &newer = whole["added_tokens"];
        if (is_empty(newer)) return;
        if (!newer.is(Kind::array)) bad(name, join("has the added tokens ", newer.dump(), "; a list is needed"));
        for (const Json &value : newer.array()) add(name, value["id"].is(Kind::integer) ? value["id"].dump() : "", value);
    }

    void read_extra(const Json &config, ClipFiles &files) const {
        const Json &newer = config["extra_special_tokens"];
        const Json &extra = is_empty(newer) ? config["additional_special_tokens"] : newer;
        if (!is_empty(extra) && !extra.is(Kind::array) && !extra.is(Kind::object))
            bad(CONFIG, join("has the extra special tokens ", extra.dump(), "; a list is needed"));
        std::vector<AddedToken> later(files.named.begin(), files.named.end());
        if (extra.is(Kind::array))
            for (const Json &value : extra.array()) later.push_back(token(CONFIG, value, true));
        if (extra.is(Kind::object))
            for (const auto &[_, value] : extra.object()) later.push_back(token(CONFIG, value, true));
        std::set<std::string> listed, special;
        for (const auto &[number, token] : files.added) listed.insert(token.content);
        for (const AddedToken &token : files.named) special.insert(token.content);
        for (const auto &[number, token] : files.added) files.in_order.push_back(token);
        for (const AddedToken &token : later)
            if (listed.count(token.content) == 0) files.in_order.push_back(token);
        for (AddedToken &token : files.in_order) token.special = token.special || special.count(token.content) != 0;
    }

    // A token given as text, or as an object with "content" and how it is to be matched.
    AddedToken token(const std::string &name, const Json &value, bool special) const {
        if (value.is(Kind::text) && !is_empty(value)) return {value.text(), true};
        const Json &content = value["content"];
        bool fits = content.is(Kind::text) && !is_empty(content);
        AddedToken token;
        const auto flag = [&](const char *key) -> std::optional<bool> {
            if (!fits || value.object().count(key) == 0) return std::nullopt;
            fits = value[key].is(Kind::boolean);
            return fits ? std::optional<bool>(value[key].boolean()) : std::nullopt;
        };
        token.single_word = flag("single_word").value_or(false);
        token.lstrip = flag("lstrip").value_or(false);
        token.rstrip = flag("rstrip").value_or(false);
        token.normalized = flag("normalized");
        if (!fits)
            bad(name, join("is ", value.dump(), "; a token is text, or an object with 'content' and true/false flags"));
        token.content = content.text();
        const Json &own = value["special"];
        token.special = special || (own.is(Kind::boolean) && own.boolean());
        return token;
    }

    std::size_t max_length(const Json &config) const {
        for (const char *side : {"padding_side", "truncation_side"}) {
            const Json &given = config[side];
            const bool right = config.object().count(side) == 0 || (given.is(Kind::text) && given.text() == "right");
            if (!right) bad(CONFIG, join("has ", side, " ", given.dump(), "; only 'right' is known"));
        }
        const Json &length = config["model_max_length"];
        if (is_empty(length)) return DEFAULT_MAX_LENGTH;
        if (!length.is(Kind::number) || length.number() != std::floor(length.number()) || length.number() < 2)
            bad(CONFIG, join("has model_max_length ", length.dump(), "; a whole number from 2 is needed"));
        return length.number() > LONGEST ? DEFAULT_MAX_LENGTH : static_cast<std::size_t>(length.number());
    }

    const TokenizerFiles &files_;
};

}  // namespace

ClipFiles read_clip_files(const TokenizerFiles &files) { return Reader(files).read(); }

}  // namespace ldm::runtime
