#include "tokenizer_files.hpp"

#include "error.hpp"

namespace ldm::runtime {

void TokenizerFiles::bad(const std::string &name, const std::string &what) const {
    throw BundleError(join("Tokenizer folder ", folder, ": ", name, " ", what, ". Export the bundle anew."));
}

Json TokenizerFiles::json(const std::string &name) const {
    const std::optional<std::string> content = read(name);
    if (!content) return Json();
    Json found;
    try {
        found = parsed(*content, Repeats::allowed);
    } catch (const MalformedError &error) {
        bad(name, join("is ", error.what()));
    }
    if (!found.is(Kind::object)) bad(name, join("holds ", found.type(), "; an object is needed"));
    return found;
}

}  // namespace ldm::runtime
