// Reading the JSON documents of a bundle without trusting them; as ldm_export/fields.py.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ldm::runtime {

using Json = nlohmann::json;

// What is wrong with a document; who reads it says which it is and what to do.
struct MalformedError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Kind { object, array, text, integer, number, boolean };  // an integer is a number too; true is neither

enum class Repeats { allowed, refused };  // of a key in an object; the last one counts

// Parse; NaN, infinity, a byte order mark and nesting deeper than 500 are refused.
Json parsed(std::string_view text, Repeats repeats);

// The member `key`, of exactly this kind; `where` names the holder, "" being the whole document.
const Json &field(const Json &holder, const std::string &key, Kind kind, const std::string &where = "");

void check_kind(const Json &value, Kind kind, const std::string &where);
bool is_kind(const Json &value, Kind kind);

// A listed file: its size, and its SHA-256 as 64 lower-case hex digits.
struct FileEntry {
    std::int64_t size_bytes;
    std::string sha256;
};

// The member "files": entries by plain relative paths.
std::map<std::string, FileEntry> files_of(const Json &document);

// A member that is an object of texts.
std::map<std::string, std::string> texts_of(const Json &holder, const std::string &key, const std::string &where = "");

// Refuse a path unless it is relative, with / between its parts, and stays inside the folder.
void check_path(const std::string &relative);

}  // namespace ldm::runtime
