// What targets of every kind have in common: a folder of the bundle with a target.json that lists its files.
#pragma once

#include "bundle.hpp"

#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ldm::runtime {

// Why a target is not used: words that go on from "since". Nothing that is wrong with one is wrong with the bundle.
struct PassedOver : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The text of a target.json as JSON; throws MalformedError unless it is of this format and of this kind, its folder's name.
Json target_document(std::string_view text, const std::string &kind);

constexpr const char *TARGET = "target.json";

// Have `parse` read the text of a target's target.json, which gives the files that it lists, and hold those that are there
// against it. Throws PassedOver, also for what `parse` throws of a malformed text.
ListedFiles read_target_files(const Bundle &bundle, const std::string &kind,
                              const std::function<std::map<std::string, FileEntry>(const std::string &text)> &parse);

}  // namespace ldm::runtime
