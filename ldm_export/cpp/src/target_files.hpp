// What targets of every kind have in common: a folder of the bundle with a target.json that lists its files.
#pragma once

#include "bundle.hpp"

#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ldm::runtime {

// Why a target is not used: words that go on from "since". Nothing that is wrong with one is wrong with the bundle.
struct PassedOver : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The text of a target.json as JSON; throws MalformedError unless it is of this format and names its folder's kind.
Json target_document(std::string_view text, const fs::path &folder);

// What a target.json says of the files beside it.
struct Listing {
    std::map<std::string, FileEntry> files;
    std::set<std::string> opened;  // of those that it lists, or should
};

// Have `parse` read the text of a target's target.json, and hold the files that are there against what it gives. Throws
// PassedOver, also for what `parse` throws of a malformed text.
void read_target_files(const Bundle &bundle, const fs::path &folder,
                       const std::function<Listing(const std::string &text)> &parse);

}  // namespace ldm::runtime
