// Reading the JSON documents of a bundle without trusting them; as ldm_export/reading/json_fields.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace ldm::runtime {

// What is wrong with a document; who reads it says which it is and what to do.
struct MalformedError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An integer, which fits in 64 bits, is a number too; true is neither.
enum class Kind { object, array, text, integer, number, boolean };

// A JSON value. The parser's own allocates in its destructor, and so cannot be where memory may run out.
class Json {
  public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json, std::less<>>;

    Json() = default;  // null
    Json(bool value) : value_(value) {}
    Json(std::int64_t value) : value_(value) {}
    Json(double value) : value_(value) {}
    Json(std::string value) : value_(std::move(value)) {}
    Json(const char *value) : value_(std::string(value)) {}
    Json(Array value) : value_(std::move(value)) {}
    Json(Object value) : value_(std::move(value)) {}

    // Hold another value.
    template <class Value>
    void assign(Value value) {
        value_ = std::move(value);
    }

    bool is(Kind kind) const;
    bool is_null() const { return value_.index() == 0; }
    const char *type() const;  // such as "an object", for messages

    // What it holds, which must have been checked; an integer is a number too.
    bool boolean() const { return std::get<bool>(value_); }
    std::int64_t integer() const { return std::get<std::int64_t>(value_); }
    double number() const;
    const std::string &text() const { return std::get<std::string>(value_); }
    const Array &array() const { return std::get<Array>(value_); }
    const Object &object() const { return std::get<Object>(value_); }
    Array &array() { return std::get<Array>(value_); }
    Object &object() { return std::get<Object>(value_); }

    // A member; null where it is missing or this is no object.
    const Json &operator[](std::string_view key) const;

    std::string dump() const;  // as JSON

  private:
    std::variant<std::monostate, bool, std::int64_t, double, std::string, Array, Object> value_;
};

enum class Repeats { allowed, refused };    // of a key in an object; the last one counts
enum class Constants { refused, allowed };  // NaN, Infinity and -Infinity, which diffusers writes

// Parse; a byte order mark and nesting deeper than 500 are refused.
Json parsed(std::string_view text, Repeats repeats, Constants constants = Constants::refused);

// The member `key`, of exactly this kind; `where` names the holder, "" being the whole document.
const Json &field(const Json &holder, const std::string &key, Kind kind, const std::string &where = "");

void check_kind(const Json &value, Kind kind, const std::string &where);

// A listed file: its size, and its SHA-256 as 64 lower-case hex digits.
struct FileEntry {
    std::int64_t size_bytes;
    std::string sha256;
};

// Whether a text is 64 lower-case hex digits.
bool is_sha256(const std::string &text);

// The member "files": entries by plain relative paths.
std::map<std::string, FileEntry> files_of(const Json &document);

// A member that is an object of texts.
std::map<std::string, std::string> texts_of(const Json &holder, const std::string &key, const std::string &where = "");

// Refuse a path unless it is relative, with / between its parts, and stays inside the folder.
void check_path(const std::string &relative);

}  // namespace ldm::runtime
