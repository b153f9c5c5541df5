#include "target_files.hpp"

#include "error.hpp"

#include <system_error>

namespace ldm::runtime {

namespace {

constexpr const char *TARGET = "target.json";
constexpr std::int64_t FORMAT_VERSION = 1;

void check_files(const Listing &listing, const fs::path &folder, const std::map<std::string, std::int64_t> &present,
                 bool verify) {
    std::set<std::string> wanted = listing.opened;
    for (const auto &[name, _] : listing.files) wanted.insert(name);
    for (const std::string &name : wanted) {
        const auto listed = listing.files.find(name);
        const auto there = present.find(name);
        if (listed == listing.files.end() || there == present.end()) throw PassedOver("its " + name + " is missing");
        if (there->second != listed->second.size_bytes)
            throw PassedOver(
                join("its ", name, " has ", there->second, " bytes, and ", listed->second.size_bytes, " are listed"));
    }
    for (const auto &[name, _] : present)
        if (name != TARGET && listing.files.count(name) == 0) throw PassedOver("its " + name + " is not listed");
    if (verify)
        for (const auto &[name, entry] : listing.files)
            if (sha256_of(folder / name) != entry.sha256) throw PassedOver("its " + name + " has been altered");
}

}  // namespace

Json target_document(std::string_view text, const fs::path &folder) {
    Json document = parsed(text, Repeats::refused);
    if (const Json &version = field(document, "format_version", Kind::integer); version.integer() != FORMAT_VERSION)
        throw MalformedError(join("it has format_version ", version.dump(), "; this ldm_export reads ", FORMAT_VERSION));
    if (const Json &kind = field(document, "kind", Kind::text); kind.text() != folder.filename().string())
        throw MalformedError("it is of the kind " + kind.dump());
    return document;
}

void read_target_files(const Bundle &bundle, const fs::path &folder,
                       const std::function<Listing(const std::string &text)> &parse) {
    if (fs::is_symlink(folder) || fs::is_symlink(folder.parent_path())) throw PassedOver("its folder is a link");
    try {
        const std::map<std::string, std::int64_t> present = walk(folder);
        if (present.count(TARGET) == 0) throw PassedOver(join("its ", TARGET, " is missing"));
        check_files(parse(read_text(folder / TARGET)), folder, present, bundle.verified);
    } catch (const UnlikeFile &found) {
        throw PassedOver("its " + found.relative + " is a link or a device");
    } catch (const MalformedError &error) {
        throw PassedOver(join("its ", TARGET, " cannot be read (", error.what(), ")"));
    } catch (const std::system_error &error) {
        throw PassedOver(join("its ", TARGET, " cannot be read (", error.what(), ")"));
    }
}

}  // namespace ldm::runtime
