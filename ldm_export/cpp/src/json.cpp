#include "json.hpp"

#include "error.hpp"

#include <set>
#include <vector>

namespace ldm::runtime {

namespace {

constexpr int DEEPEST = 500;

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

std::string named(const std::string &where) { return where.empty() ? "the whole" : where; }

// In quotes, control characters escaped.
std::string quoted(const std::string &text) {
    std::string json = Json(text).dump();
    json.front() = json.back() = '\'';
    return json;
}

bool is_plain(const std::string &part) {
    return !part.empty() && part.front() != ' ' && part.back() != ' ' && part.back() != '.';
}

}  // namespace

Json parsed(std::string_view text, Repeats repeats) {
    if (text.substr(0, 3) == "\xEF\xBB\xBF") throw MalformedError("not JSON: it begins with a byte order mark");
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    const auto watch = [&](int depth, Json::parse_event_t event, Json &value) {
        if (depth > DEEPEST) throw MalformedError("not JSON that can be read: it is nested too deep");
        if (repeats == Repeats::allowed) return true;
        if (event == Json::parse_event_t::object_start) keys.emplace_back();
        if (event == Json::parse_event_t::object_end) keys.pop_back();
        if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
            throw MalformedError("not JSON: the key " + value.dump() + " occurs twice");
        return true;
    };
    try {
        return Json::parse(text, watch);
    } catch (const Json::exception &error) {
        throw MalformedError(std::string("not JSON: ") + error.what());
    }
}

bool is_kind(const Json &value, Kind kind) {
    switch (kind) {
        case Kind::object: return value.is_object();
        case Kind::array: return value.is_array();
        case Kind::text: return value.is_string();
        case Kind::integer:
            return value.is_number_integer() && (!value.is_number_unsigned() || value.get<std::uint64_t>() <= INT64_MAX);
        case Kind::number: return value.is_number();
        case Kind::boolean: return value.is_boolean();
    }
    return false;
}

void check_kind(const Json &value, Kind kind, const std::string &where) {
    if (!is_kind(value, kind))
        throw MalformedError(join(named(where), " is of type ", value.type_name(), "; ", name_of(kind), " is needed"));
}

const Json &field(const Json &holder, const std::string &key, Kind kind, const std::string &where) {
    check_kind(holder, Kind::object, where);
    const auto found = holder.find(key);
    if (found == holder.end()) throw MalformedError(join(named(where), " lacks '", key, "'"));
    check_kind(*found, kind, where.empty() ? key : where + "." + key);
    return *found;
}

std::map<std::string, FileEntry> files_of(const Json &document) {
    std::map<std::string, FileEntry> files;
    for (const auto &[path, entry] : field(document, "files", Kind::object).items()) {
        check_path(path);
        const std::string where = "files[" + quoted(path) + "]";
        FileEntry file{field(entry, "size_bytes", Kind::integer, where), field(entry, "sha256", Kind::text, where)};
        const bool hex = file.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
        if (file.size_bytes < 0 || file.sha256.size() != 64 || !hex)
            throw MalformedError(where + " is " + entry.dump() + "; a size from 0 and 64 hex digits are needed");
        files.emplace(path, std::move(file));
    }
    return files;
}

std::map<std::string, std::string> texts_of(const Json &holder, const std::string &key, const std::string &where) {
    std::map<std::string, std::string> texts;
    for (const auto &[name, value] : field(holder, key, Kind::object, where).items()) {
        check_kind(value, Kind::text, key + "." + name);
        texts.emplace(name, value);
    }
    return texts;
}

void check_path(const std::string &relative) {
    std::size_t start = 0;
    for (std::size_t end = 0; end != std::string::npos; start = end + 1) {
        end = relative.find('/', start);
        if (!is_plain(relative.substr(start, end == std::string::npos ? end : end - start)))
            throw MalformedError("the path " + quoted(relative) + " is not a plain one inside the folder");
    }
    for (const char c : relative)
        if (static_cast<unsigned char>(c) < 0x20 || std::string_view("\\:*?\"<>|").find(c) != std::string_view::npos)
            throw MalformedError("the path " + quoted(relative) + " has a character that is not the same on every system");
}

}  // namespace ldm::runtime
