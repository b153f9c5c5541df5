// The errors that are told apart, as in ldm_export/errors.py; each is a status of ldm.h and a sentence.
#pragma once

#include <ldm/ldm.h>

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ldm::runtime {

struct Error : std::runtime_error {
    Error(ldm_status code, const std::string &sentence) : std::runtime_error(sentence), status(code) {}
    ldm_status status;
};

template <ldm_status Status>
struct ErrorOf : Error {
    explicit ErrorOf(const std::string &sentence) : Error(Status, sentence) {}
};

using InputError = ErrorOf<LDM_ERROR_INPUT>;
using BundleError = ErrorOf<LDM_ERROR_BUNDLE>;
using BackendError = ErrorOf<LDM_ERROR_BACKEND>;
using CancelledError = ErrorOf<LDM_ERROR_CANCELLED>;
using BufferError = ErrorOf<LDM_ERROR_BUFFER>;
using CallbackError = ErrorOf<LDM_ERROR_CALLBACK>;

// The parts as one text, numbers written alike whatever locale the application has set.
template <class... Parts>
std::string join(const Parts &...parts) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    (text << ... << parts);
    return text.str();
}

// The items with a comma between them.
template <class Items>
std::string listed(const Items &items, const char *if_none = "") {
    std::string text;
    for (const auto &item : items) text += (text.empty() ? "" : ", ") + std::string(item);
    return text.empty() ? if_none : text;
}

// Another library's text without line breaks.
inline std::string one_line(const char *text) {
    std::istringstream words(text);
    std::string line;
    for (std::string word; words >> word;) line += (line.empty() ? "" : " ") + word;
    return line;
}

}  // namespace ldm::runtime
