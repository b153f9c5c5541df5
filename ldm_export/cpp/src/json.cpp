#include "json.hpp"

#include "error.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace ldm::runtime {

namespace {

constexpr std::size_t DEEPEST = 500, LONGEST_PATH = 1024;

const char *name_of(Kind kind) {
    switch (kind) {
        case Kind::object: return "an object";
        case Kind::array: return "an array";
        case Kind::text: return "text";
        case Kind::integer: return "a whole number";
        case Kind::number: return "a number";
        case Kind::boolean: return "true or false";
    }
    return "";
}

// What the parser tells, as one value.
class Builder {
  public:
    // constants: what texts stand for, by their number among all texts, keys included
    Builder(Repeats repeats, std::map<std::size_t, double> constants) : repeats_(repeats), constants_(std::move(constants)) {}

    bool null() { return add(std::monostate()); }
    bool boolean(bool value) { return add(value); }
    bool number_integer(std::int64_t value) { return add(value); }
    bool number_unsigned(std::uint64_t value) {
        return value <= INT64_MAX ? add(static_cast<std::int64_t>(value)) : add(static_cast<double>(value));
    }
    bool number_float(double value, const std::string &) { return add(value); }
    bool string(std::string &value) {
        const auto constant = constants_.find(texts_++);
        return constant == constants_.end() ? add(std::move(value)) : add(constant->second);
    }
    bool binary(nlohmann::json::binary_t &) { return false; }
    bool start_object(std::size_t) { return open(Json::Object()); }
    bool start_array(std::size_t) { return open(Json::Array()); }
    bool end_object() { return close(); }
    bool end_array() { return close(); }
    bool key(std::string &name) {
        if (constants_.count(texts_++) != 0) throw MalformedError("not JSON: a key is no text");
        key_ = std::move(name);
        if (repeats_ == Repeats::refused && open_.back()->object().count(key_) != 0)
            throw MalformedError("not JSON: the key " + Json(key_).dump() + " occurs twice");
        return true;
    }
    bool parse_error(std::size_t, const std::string &, const nlohmann::json::exception &error) {
        throw MalformedError(std::string("not JSON: ") + error.what());
    }

    Json whole;

  private:
    // Where the next value belongs.
    Json &place() {
        if (open_.empty()) return whole;
        Json &holder = *open_.back();
        return holder.is(Kind::array) ? holder.array().emplace_back() : holder.object()[key_];
    }
    template <class Value>
    bool add(Value value) {
        place().assign(std::move(value));
        return true;
    }
    template <class Container>
    bool open(Container empty) {
        if (open_.size() >= DEEPEST) throw MalformedError("not JSON that can be read: it is nested too deep");
        Json &container = place();
        container.assign(std::move(empty));
        open_.push_back(&container);
        return true;
    }
    bool close() {
        open_.pop_back();
        return true;
    }

    Repeats repeats_;
    std::map<std::size_t, double> constants_;
    std::size_t texts_ = 0;  // strings so far
    std::vector<Json *> open_;  // the containers around what comes next; only the innermost one grows, so that none moves
    std::string key_;
};

// The text with an empty text in place of each NaN, Infinity and -Infinity, which the parser does not know, and what each is
// by its number among all texts.
std::string without_constants(std::string_view text, std::map<std::size_t, double> &constants) {
    static const std::pair<std::string_view, double> known[] = {
        {"NaN", std::nan("")}, {"-Infinity", -INFINITY}, {"Infinity", INFINITY}};
    std::string plain;
    std::size_t texts = 0;
    for (std::size_t i = 0; i < text.size();) {
        if (text[i] == '"') {
            const std::size_t start = i++;
            while (i < text.size() && text[i] != '"') i += text[i] == '\\' ? 2 : 1;
            i = std::min(i + 1, text.size());
            plain += text.substr(start, i - start);
            ++texts;
            continue;
        }
        const auto here = std::find_if(std::begin(known), std::end(known),
                                       [&](const auto &item) { return text.substr(i, item.first.size()) == item.first; });
        if (here == std::end(known)) {
            plain += text[i++];
            continue;
        }
        constants.emplace(texts++, here->second);
        plain += "\"\"";
        i += here->first.size();
    }
    return plain;
}

std::string escaped(const std::string &text) {
    std::string json = "\"";
    for (const char c : text) {
        char code[8] = {c};
        if (c == '"' || c == '\\')
            std::snprintf(code, sizeof code, "\\%c", c);
        else if (static_cast<unsigned char>(c) < 0x20)
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
        json += c == '\0' ? "\\u0000" : code;
    }
    return json + '"';
}

std::string named(const std::string &where) { return where.empty() ? "the whole" : where; }

// In quotes, control characters escaped.
std::string quoted(const std::string &text) {
    std::string json = escaped(text);
    json.front() = json.back() = '\'';
    return json;
}

bool is_plain(const std::string &part) {
    return !part.empty() && part.front() != ' ' && part.back() != ' ' && part.back() != '.';
}

}  // namespace

Json parsed(std::string_view text, Repeats repeats, Constants allowed) {
    if (text.substr(0, 3) == "\xEF\xBB\xBF") throw MalformedError("not JSON: it begins with a byte order mark");
    if (text.find('\0') != std::string_view::npos)  // which ends the text for the parser
        throw MalformedError("not JSON: it has the character NUL");
    std::map<std::size_t, double> constants;
    std::string plain;
    if (allowed == Constants::allowed) text = plain = without_constants(text, constants);
    Builder builder(repeats, std::move(constants));
    nlohmann::json::sax_parse(text, &builder);
    return std::move(builder.whole);
}

bool Json::is(Kind kind) const {
    switch (kind) {
        case Kind::object: return std::holds_alternative<Object>(value_);
        case Kind::array: return std::holds_alternative<Array>(value_);
        case Kind::text: return std::holds_alternative<std::string>(value_);
        case Kind::integer: return std::holds_alternative<std::int64_t>(value_);
        case Kind::number: return is(Kind::integer) || std::holds_alternative<double>(value_);
        case Kind::boolean: return std::holds_alternative<bool>(value_);
    }
    return false;
}

const char *Json::type() const {
    for (const Kind kind : {Kind::object, Kind::array, Kind::text, Kind::number, Kind::boolean})
        if (is(kind)) return name_of(kind);
    return "null";
}

double Json::number() const { return is(Kind::integer) ? static_cast<double>(integer()) : std::get<double>(value_); }

const Json &Json::operator[](std::string_view key) const {
    static const Json none;
    if (!is(Kind::object)) return none;
    const auto found = object().find(key);
    return found == object().end() ? none : found->second;
}

std::string Json::dump() const {
    if (is(Kind::text)) return escaped(text());
    if (is(Kind::boolean)) return boolean() ? "true" : "false";
    if (is(Kind::integer)) return std::to_string(integer());
    if (is(Kind::number)) return join(number());
    std::string inside;
    if (is(Kind::array)) {
        for (const Json &value : array()) inside += (inside.empty() ? "" : ",") + value.dump();
        return "[" + inside + "]";
    }
    if (is(Kind::object)) {
        for (const auto &[key, value] : object()) inside += (inside.empty() ? "" : ",") + escaped(key) + ":" + value.dump();
        return "{" + inside + "}";
    }
    return "null";
}

void check_kind(const Json &value, Kind kind, const std::string &where) {
    if (!value.is(kind))
        throw MalformedError(join(named(where), " is ", value.type(), "; ", name_of(kind), " is needed"));
}

const Json &field(const Json &holder, const std::string &key, Kind kind, const std::string &where) {
    check_kind(holder, Kind::object, where);
    const auto found = holder.object().find(key);
    if (found == holder.object().end()) throw MalformedError(join(named(where), " lacks '", key, "'"));
    check_kind(found->second, kind, where.empty() ? key : where + "." + key);
    return found->second;
}

bool is_sha256(const std::string &text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::map<std::string, FileEntry> files_of(const Json &document) {
    std::map<std::string, FileEntry> files;
    for (const auto &[path, entry] : field(document, "files", Kind::object).object()) {
        check_path(path);
        const std::string where = "files[" + quoted(path) + "]";
        FileEntry file{field(entry, "size_bytes", Kind::integer, where).integer(),
                       field(entry, "sha256", Kind::text, where).text()};
        if (file.size_bytes < 0 || !is_sha256(file.sha256))
            throw MalformedError(where + " is " + entry.dump() + "; a size from 0 and 64 hex digits are needed");
        files.emplace(path, std::move(file));
    }
    return files;
}

std::map<std::string, std::string> texts_of(const Json &holder, const std::string &key, const std::string &where) {
    std::map<std::string, std::string> texts;
    for (const auto &[name, value] : field(holder, key, Kind::object, where).object()) {
        check_kind(value, Kind::text, key + "." + name);
        texts.emplace(name, value.text());
    }
    return texts;
}

void check_path(const std::string &relative) {
    const auto goes_on = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; };  // within a character
    if (relative.size() - static_cast<std::size_t>(std::count_if(relative.begin(), relative.end(), goes_on)) > LONGEST_PATH)
        throw MalformedError(join("the path ", quoted(relative.substr(0, 40)), "... has more than ", LONGEST_PATH, " characters"));
    std::size_t start = 0;
    for (std::size_t end = 0; end != std::string::npos; start = end + 1) {
        end = relative.find('/', start);
        if (!is_plain(relative.substr(start, end == std::string::npos ? end : end - start)))
            throw MalformedError("the path " + quoted(relative) + " is not a plain one inside the folder");
    }
    for (const char c : relative)
        if (static_cast<unsigned char>(c) < 0x20 || c == '\x7f' || std::string_view("\\:*?\"<>|").find(c) != std::string_view::npos)
            throw MalformedError("the path " + quoted(relative) + " has a character that is not the same on every system");
}

}  // namespace ldm::runtime
