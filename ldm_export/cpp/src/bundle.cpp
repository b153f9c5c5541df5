#include "bundle.hpp"

#include "error.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <set>
#include <system_error>

namespace ldm::runtime {

namespace {

constexpr const char *ANEW = "Export the bundle anew.";

BundleError bad(const fs::path &folder, const std::string &what, const char *remedy = ANEW) {
    return BundleError(join("Bundle ", folder.string(), ": ", what, ". ", remedy));
}

// Folders that an export fills before it renames them (ldm_export/bundle/atomic.py).
bool is_partial(const fs::path &folder) {
    constexpr std::string_view mark = ".partial-", digits = "0123456789", hex = "0123456789abcdef";
    std::error_code ignored;
    const fs::path whole = fs::weakly_canonical(folder, ignored);
    const std::string name = (whole.has_filename() ? whole : whole.parent_path()).filename().string();
    const std::size_t at = name.rfind(mark);
    if (at == std::string::npos || at < 2 || name[0] != '.') return false;
    const std::string number = name.substr(at + mark.size());  // of a process, a dash, and some hex digits
    const std::size_t dash = number.find_first_not_of(digits);
    return dash != 0 && dash != std::string::npos && number[dash] == '-' && dash + 1 < number.size() &&
           number.find_first_not_of(hex, dash + 1) == std::string::npos;
}

std::map<std::string, std::int64_t> checked_walk(const Folder &files) {
    const fs::path &folder = files.path();
    try {
        return files.walk("", TARGETS);
    } catch (const UnlikeFile &found) {
        if (found.link) throw bad(folder, "'" + found.relative + "' is a link; a bundle has none", "Put the file itself there.");
        throw bad(folder, "'" + found.relative + "' is neither a file nor a folder", "Delete it.");
    } catch (const std::system_error &error) {
        if (error.code() == std::errc::no_such_file_or_directory)
            throw bad(folder, "there is no such folder", "Check the path.");
        throw bad(folder, join("the folder cannot be read (", error.what(), ")"), "Check the path.");
    }
}

Manifest read_manifest(const Folder &folder) {
    const fs::path &path = folder.path();
    try {
        const File file = folder.open(MANIFEST);
        const std::int64_t size = file.size();
        if (size > MOST_BYTES) throw MalformedError(join("is ", size, " bytes long; at most ", MOST_BYTES, " are read"));
        const std::string text = file.first(size);
        if (!is_utf8(text)) throw MalformedError("cannot be read as UTF-8 text");
        return manifest_from_json(text);
    } catch (const std::system_error &error) {
        throw bad(path, join(MANIFEST, " cannot be read (", error.what(), ")"));
    } catch (const UnlikeFile &) {
        throw bad(path, join(MANIFEST, " is a link or no regular file"));
    } catch (const MalformedError &error) {
        throw bad(path, join(MANIFEST, " ", error.what()));
    } catch (const BundleError &error) {
        throw BundleError(join("Bundle ", path.string(), ": ", error.what()));
    }
}

bool ends_in_onnx(std::string path) {
    std::transform(path.begin(), path.end(), path.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
    return path.size() >= 5 && path.compare(path.size() - 5, 5, ".onnx") == 0;
}

// What people and tools put beside a bundle's files: hidden files and folders, and a README.md.
bool may_lie_beside(const std::string &relative) {
    return relative == "README.md" || relative[0] == '.' || relative.find("/.") != std::string::npos;
}

}  // namespace

Bundle Bundle::open(const fs::path &folder, bool verify) {
    if (is_partial(folder))
        throw BundleError(folder.string() + " is what an interrupted export left behind. Delete it and export again.");
    const Folder files(folder);
    const std::map<std::string, std::int64_t> present = checked_walk(files);
    if (present.count(MANIFEST) == 0)
        throw bad(folder, join(MANIFEST, " is missing, so it is no bundle"), "Give the folder that export wrote.");
    Manifest manifest = read_manifest(files);
    ListedFiles listed(files, "", MANIFEST, manifest.files, verify);
    listed.check_sizes(present);
    std::set<std::string> models;
    for (const auto &[relative, _] : manifest.files)
        if (ends_in_onnx(relative)) models.insert(relative);
    for (const auto &[_, graph] : manifest.graphs) models.insert(graph.path);
    for (const std::string &relative : models) listed.check_graph(relative);
    if (verify) {
        listed.check_hashes();
        for (const auto &[relative, size] : present)
            if (relative != MANIFEST && !listed.has(relative) && !may_lie_beside(relative))
                throw bad(folder, join("'", relative, "' is not listed in ", MANIFEST),
                          "Delete it, or export the bundle anew.");
    }
    return {std::move(manifest), std::move(listed)};
}

}  // namespace ldm::runtime
