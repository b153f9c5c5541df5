#include "target_files.hpp"

#include "error.hpp"
#include "unicode.hpp"

#include <system_error>

namespace ldm::runtime {

namespace {

constexpr std::int64_t FORMAT_VERSION = 2;

}  // namespace

Json target_document(std::string_view text, const std::string &kind) {
    Json document = parsed(text, Repeats::refused);
    if (const Json &version = field(document, "format_version", Kind::integer); version.integer() != FORMAT_VERSION)
        throw MalformedError(join("it has format_version ", version.dump(), "; this ldm_export reads ", FORMAT_VERSION));
    if (const Json &found = field(document, "kind", Kind::text); found.text() != kind)
        throw MalformedError(join("it is of the kind ", found.dump()));
    return document;
}

ListedFiles read_target_files(const Bundle &bundle, const std::string &kind,
                              const std::function<std::map<std::string, FileEntry>(const std::string &text)> &parse) {
    const Folder &folder = bundle.files.folder();
    const std::string start = join(TARGETS, "/", kind);
    try {
        const std::map<std::string, std::int64_t> present = folder.walk(start);
        if (present.count(TARGET) == 0) throw PassedOver(join("its ", TARGET, " is missing"));
        const File file = folder.open(join(start, "/", TARGET));
        if (const std::int64_t size = file.size(); size > MOST_BYTES)
            throw MalformedError(join(size, " bytes; at most ", MOST_BYTES, " are read"));
        const std::string text = file.first(file.size());
        if (!is_utf8(text)) throw MalformedError("not UTF-8 text");
        ListedFiles files(folder, start + "/", TARGET, parse(text), bundle.verified());
        files.check_sizes(present);
        for (const auto &[name, _] : present)
            if (name != TARGET && !files.has(name)) throw PassedOver("its " + name + " is not listed");
        if (bundle.verified()) files.check_hashes();
        return files;
    } catch (const UnlikeFile &found) {
        const std::string name = found.relative.size() > start.size() + 1 ? found.relative.substr(start.size() + 1) : "folder";
        throw PassedOver(join("its ", name, found.link ? " is a link" : " is neither a file nor a folder"));
    } catch (const BundleError &error) {
        throw PassedOver(error.what());
    } catch (const MalformedError &error) {
        throw PassedOver(join("its ", TARGET, " cannot be read (", error.what(), ")"));
    } catch (const std::system_error &error) {
        throw PassedOver(join("its ", TARGET, " cannot be read (", error.what(), ")"));
    }
}

}  // namespace ldm::runtime
