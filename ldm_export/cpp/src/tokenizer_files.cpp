#include "tokenizer_files.hpp"

#include "error.hpp"
#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <system_error>

namespace ldm::runtime {

namespace {

constexpr const char *END_OF_WORD = "</w>";
constexpr const char *CONFIG = "tokenizer_config.json";
constexpr std::int64_t DEFAULT_MAX_LENGTH = 77;
constexpr std::int64_t LONGEST = 1 << 20;  // transformers writes 10**30 for "no limit"

struct Named {
    const char *role, *token;
};
constexpr std::array<Named, 4> NAMED{{{"bos_token", "<|startoftext|>"},
                                      {"eos_token", "<|endoftext|>"},
                                      {"unk_token", "<|endoftext|>"},
                                      {"pad_token", "<|endoftext|>"}}};

bool is_empty(const Json &value) {  // what Python takes for false
    return value.is_null() || (is_kind(value, Kind::text) && value.get_ref<const std::string &>().empty()) ||
           ((value.is_structured()) && value.empty()) || value == false || (value.is_number() && value == 0);
}

std::optional<TokenId> id_of(const std::string &digits) {
    const bool decimal = !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos;
    return decimal && digits.size() < 10 ? std::optional<TokenId>(std::stoll(digits)) : std::nullopt;
}

class Reader {
  public:
    explicit Reader(fs::path folder) : folder_(std::move(folder)) {}

    TokenizerFiles read() const {
        const Json whole = json("tokenizer.json");
        Json config = json(CONFIG);
        if (config.is_null()) config = Json::object();
        if (!config.contains("added_tokens_decoder"))
            if (const Json special = json("special_tokens_map.json"); special.is_object()) config.update(special);
        TokenizerFiles files;
        for (std::size_t role = 0; role < NAMED.size(); ++role) {
            const Json value = config.value(NAMED[role].role, Json());
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
    [[noreturn]] void bad(const std::string &name, const std::string &what) const {
        throw BundleError(join("Tokenizer folder ", folder_.string(), ": ", name, " ", what, ". Export the bundle anew."));
    }

    std::string text(const std::string &name) const {
        if (!fs::exists(folder_ / name)) bad(name, "is missing");
        try {
            return read_text(folder_ / name);
        } catch (const std::system_error &error) {
            bad(name, join("cannot be read as UTF-8 text (", error.what(), ")"));
        } catch (const MalformedError &error) {
            bad(name, join("cannot be read as UTF-8 text (", error.what(), ")"));
        }
    }

    // The object in a file, or null if there is no such file.
    Json json(const std::string &name) const {
        if (!fs::exists(folder_ / name)) return nullptr;
        Json found;
        const std::string content = text(name);
        try {
            found = parsed(content, Repeats::allowed);
        } catch (const MalformedError &error) {
            bad(name, join("is ", error.what()));
        }
        if (!found.is_object()) bad(name, join("holds a JSON ", found.type_name(), "; an object is needed"));
        return found;
    }

    void read_vocabulary(const Json &whole, TokenizerFiles &files) const {
        const char *name = whole.is_null() ? "vocab.json" : "tokenizer.json";
        Json vocabulary;
        if (whole.is_null()) {
            vocabulary = json(name);
            if (vocabulary.is_null()) bad(name, "is missing");
        } else {
            const Json model = whole.value("model", Json());
            if (!model.is_object() || model.value("end_of_word_suffix", Json()) != END_OF_WORD)
                bad(name, join("is not CLIP's, which has a BPE model with end_of_word_suffix '", END_OF_WORD, "'"));
            vocabulary = model.value("vocab", Json());
        }
        if (!vocabulary.is_object()) bad(name, "lacks the vocabulary or the merges");
        std::set<TokenId> numbers;
        for (const auto &[token, number] : vocabulary.items()) {
            if (!is_kind(number, Kind::integer) || number < 0 || number > INT32_MAX)
                bad(name, join("gives '", token, "' the id ", number.dump(), "; ids are whole numbers from 0"));
            if (!numbers.insert(number.get<TokenId>()).second) bad(name, "gives two tokens the same id");
            files.vocabulary.emplace(token, number.get<TokenId>());
        }
    }

    void read_merges(const Json &whole, TokenizerFiles &files) const {
        const char *name = whole.is_null() ? "merges.txt" : "tokenizer.json";
        if (whole.is_null()) {
            const std::string lines = text(name);
            for (std::size_t start = 0, end; start < lines.size(); start = end + 1) {
                end = std::min(lines.find('\n', start), lines.size());
                std::string line = lines.substr(start, end - start);
                if (!line.empty() && line.back() == '\r' && end < lines.size()) line.pop_back();
                if (!line.empty() && line.rfind("#version", 0) != 0) add_merge(name, line, files);
            }
            return;
        }
        const Json merges = whole["model"].value("merges", Json());
        if (!merges.is_array()) bad(name, "lacks the vocabulary or the merges");
        for (const Json &merge : merges) {
            if (merge.is_string()) {
                add_merge(name, merge.get<std::string>(), files);
                continue;
            }
            if (!merge.is_array() || merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string())
                bad(name, join("has the merge ", merge.dump(), "; a merge is two tokens"));
            add_merge(name, merge[0], merge[1], files);
        }
    }

    void add_merge(const std::string &name, const std::string &line, TokenizerFiles &files) const {
        const std::size_t space = line.find(' ');
        if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
            bad(name, join("has the merge '", line, "'; a merge is two tokens"));
        add_merge(name, line.substr(0, space), line.substr(space + 1), files);
    }

    void add_merge(const std::string &name, const std::string &first, const std::string &second,
                   TokenizerFiles &files) const {
        for (const std::string &token : {first, second, first + second})
            if (files.vocabulary.count(token) == 0)
                bad(name, join("has the merge '", first, " ", second, "', but '", token, "' is not in the vocabulary"));
        files.merges.emplace_back(first, second);
    }

    // The tokens outside the merges; added_tokens_decoder makes the older places for them moot.
    void read_added(const Json &config, const Json &whole, TokenizerFiles &files) const {
        const auto add = [&](const char *name, const std::string &number, const Json &value) {
            const std::optional<TokenId> id = id_of(number);
            if (!id) bad(name, join("gives an added token the id ", number, "; ids are whole numbers from 0"));
            files.added[*id] = token(name, value, false);
        };
        if (config.contains("added_tokens_decoder")) {
            const Json &decoder = config["added_tokens_decoder"];
            if (!decoder.is_object()) bad(CONFIG, join("has the added tokens ", decoder.dump(), "; an object is needed"));
            for (const auto &[number, value] : decoder.items()) add(CONFIG, number, value);
            return;
        }
        const char *name = "added_tokens.json or tokenizer.json";
        if (const Json older = json("added_tokens.json"); older.is_object()) {
            for (const auto &[content, number] : older.items()) {
                const bool special = std::any_of(files.named.begin(), files.named.end(),
                                                 [&text = content](const AddedToken &t) { return t.content == text; });
                add(name, number.dump(), {{"content", content}, {"special", special}, {"normalized", !special}});
            }
        }
        const Json newer = whole.is_object() ? whole.value("added_tokens", Json()) : Json();
        if (!is_empty(newer) && !newer.is_array()) bad(name, join("has the added tokens ", newer.dump()));
        for (const Json &value : newer)
            add(name, value.is_object() ? value.value("id", Json()).dump() : "null", value);
    }

    void read_extra(const Json &config, TokenizerFiles &files) const {
        Json extra = config.value("extra_special_tokens", Json());
        if (is_empty(extra)) extra = config.value("additional_special_tokens", Json());
        if (!is_empty(extra) && !extra.is_structured())
            bad(CONFIG, join("has the extra special tokens ", extra.dump(), "; a list is needed"));
        std::vector<AddedToken> later(files.named.begin(), files.named.end());
        if (!is_empty(extra))
            for (const Json &value : extra) later.push_back(token(CONFIG, value, true));
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
        if (value.is_string() && !is_empty(value)) return {value.get<std::string>(), true};
        const Json content = value.is_object() ? value.value("content", Json()) : Json();
        bool fits = content.is_string() && !is_empty(content);
        AddedToken token;
        const auto flag = [&](const char *key) -> std::optional<bool> {
            if (!fits || !value.contains(key)) return std::nullopt;
            fits = value[key].is_boolean();
            return fits ? std::optional<bool>(value[key].get<bool>()) : std::nullopt;
        };
        token.single_word = flag("single_word").value_or(false);
        token.lstrip = flag("lstrip").value_or(false);
        token.rstrip = flag("rstrip").value_or(false);
        token.normalized = flag("normalized");
        if (!fits)
            bad(name, join("is ", value.dump(), "; a token is text, or an object with 'content' and true/false flags"));
        token.content = content.get<std::string>();
        token.special = special || value.value("special", Json()) == true;
        return token;
    }

    std::size_t max_length(const Json &config) const {
        Json length = config.value("model_max_length", Json());
        if (is_empty(length)) length = DEFAULT_MAX_LENGTH;
        for (const char *side : {"padding_side", "truncation_side"})
            if (const Json given = config.value(side, Json("right")); given != "right")
                bad(CONFIG, join("has ", side, " ", given.dump(), "; only 'right' is known"));
        const bool whole = length.is_number() && length.get<double>() == std::floor(length.get<double>());
        if (!whole || length < 2)
            bad(CONFIG, join("has model_max_length ", length.dump(), "; a whole number from 2 is needed"));
        return static_cast<std::size_t>(length > LONGEST ? DEFAULT_MAX_LENGTH : length.get<std::int64_t>());
    }

    fs::path folder_;
};

}  // namespace

TokenizerFiles read_tokenizer_files(const fs::path &folder) { return Reader(folder).read(); }

}  // namespace ldm::runtime
