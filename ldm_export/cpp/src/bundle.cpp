#include "bundle.hpp"

#include "error.hpp"
#include "onnx_wire.hpp"
#include "sha256.hpp"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <set>
#include <system_error>

namespace ldm::runtime {

namespace {

constexpr const char *ANEW = "Export the bundle anew.";
constexpr std::size_t CHUNK_BYTES = 1 << 20;

BundleError bad(const fs::path &folder, const std::string &what, const char *remedy = ANEW) {
    return BundleError(join("Bundle ", folder.string(), ": ", what, ". ", remedy));
}

// Folders that an export fills before it renames them (ldm_export/partial.py).
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

std::map<std::string, std::int64_t> checked_walk(const fs::path &folder) {
    try {
        return walk(folder, TARGETS);
    } catch (const UnlikeFile &found) {
        if (found.link) throw bad(folder, "'" + found.relative + "' is a link; a bundle has none", "Put the file itself there.");
        throw bad(folder, "'" + found.relative + "' is neither a file nor a folder", "Delete it.");
    } catch (const std::system_error &error) {
        if (error.code() == std::errc::no_such_file_or_directory)
            throw bad(folder, "there is no such folder", "Check the path.");
        throw bad(folder, join("the folder cannot be read (", error.what(), ")"), "Check the path.");
    }
}

Manifest read_manifest(const fs::path &folder) {
    try {
        return manifest_from_json(read_text(folder / MANIFEST));
    } catch (const std::system_error &error) {
        throw bad(folder, join(MANIFEST, " cannot be read as UTF-8 text (", error.what(), ")"));
    } catch (const MalformedError &error) {
        throw bad(folder, join(MANIFEST, " cannot be read as UTF-8 text (", error.what(), ")"));
    } catch (const BundleError &error) {
        throw BundleError(join("Bundle ", folder.string(), ": ", error.what()));
    }
}

bool ends_in_onnx(std::string path) {
    std::transform(path.begin(), path.end(), path.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
    return path.size() >= 5 && path.compare(path.size() - 5, 5, ".onnx") == 0;
}

// The weights which an .onnx file reads must lie in listed files, and within them.
void check_external_data(const fs::path &folder, const std::string &relative, const Manifest &manifest) {
    for (const ExternalData &data : external_data_from_onnx(folder / relative)) {
        const bool plain = data.location.substr(0, 1) != "/" && data.location.find('\\') == std::string::npos;
        const fs::path joined = (fs::path(relative).parent_path() / data.location).lexically_normal();
        const auto listed = manifest.files.find(joined.generic_string());
        if (!plain || listed == manifest.files.end())
            throw bad(folder, join(relative, " reads tensor '", data.tensor, "' from '", data.location, "', which ", MANIFEST,
                                   " does not list"));
        const auto size = static_cast<std::uint64_t>(listed->second.size_bytes), length = data.length.value_or(0);
        if (data.offset > size || length > size - data.offset)
            throw bad(folder, join(relative, " reads tensor '", data.tensor, "' beyond the ", size, " bytes of '",
                                   data.location, "'"));
    }
}

void check_hashes(const fs::path &folder, const Manifest &manifest) {
    for (const auto &[relative, entry] : manifest.files) {
        std::string actual;
        try {
            actual = sha256_of(folder / relative);
        } catch (const std::system_error &error) {
            throw bad(folder, join(relative, " cannot be read (", error.what(), ")"));
        }
        if (actual != entry.sha256)
            throw bad(folder, join(relative, " has been altered: its SHA-256 is ", actual, ", ", MANIFEST, " says ",
                                   entry.sha256));
    }
}

}  // namespace

Bundle Bundle::open(const fs::path &folder, bool verify) {
    if (is_partial(folder))
        throw BundleError(folder.string() + " is what an interrupted export left behind. Delete it and export again.");
    const std::map<std::string, std::int64_t> present = checked_walk(folder);
    if (present.count(MANIFEST) == 0)
        throw bad(folder, join(MANIFEST, " is missing, so it is no bundle"), "Give the folder that export wrote.");
    Manifest manifest = read_manifest(folder);
    std::set<std::string> models;
    for (const auto &[relative, entry] : manifest.files) {
        const auto found = present.find(relative);
        if (found == present.end()) throw bad(folder, relative + " is missing");
        if (found->second != entry.size_bytes)
            throw bad(folder, join(relative, " has ", found->second, " bytes; ", MANIFEST, " says ", entry.size_bytes));
        if (ends_in_onnx(relative)) models.insert(relative);
    }
    for (const auto &[name, graph] : manifest.graphs) models.insert(graph.path);
    for (const std::string &relative : models) check_external_data(folder, relative, manifest);
    if (verify) {
        check_hashes(folder, manifest);
        for (const auto &[relative, size] : present)
            if (relative != MANIFEST && manifest.files.count(relative) == 0)
                throw bad(folder, join("'", relative, "' is not listed in ", MANIFEST),
                          "Delete it, or export the bundle anew.");
    }
    return {folder, std::move(manifest), verify};
}

std::string sha256_of(const fs::path &file) {
    errno = 0;
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw std::system_error(errno, std::generic_category(), file.filename().string());
    Sha256 digest;
    std::string chunk(CHUNK_BYTES, '\0');
    while (stream) {
        stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
        digest.update(std::string_view(chunk).substr(0, static_cast<std::size_t>(stream.gcount())));
    }
    if (stream.bad()) throw std::system_error(EIO, std::generic_category(), file.filename().string());
    return digest.hex_digest();
}

}  // namespace ldm::runtime
