// A tokenizer's files in the Hugging Face layout, each checked as it is read.
#pragma once

#include "json.hpp"

#include <functional>
#include <optional>
#include <string>

namespace ldm::runtime {

// The UTF-8 text of a file of the folder, none if it has no such file.
using ReadText = std::function<std::optional<std::string>(const std::string &name)>;

struct TokenizerFiles {
    std::string folder;  // what errors call it
    ReadText read;

    [[noreturn]] void bad(const std::string &name, const std::string &what) const;

    // The object in a file, or null if there is no such file; of a repeated key the last value.
    Json json(const std::string &name) const;
};

}  // namespace ldm::runtime
