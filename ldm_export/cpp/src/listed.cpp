#include "listed.hpp"

#include "error.hpp"
#include "memory.hpp"
#include "onnx_wire.hpp"
#include "sha256.hpp"
#include "unicode.hpp"

#include <system_error>
#include <utility>

namespace ldm::runtime {

ListedFiles::ListedFiles(Folder folder, std::string prefix, const char *document, std::map<std::string, FileEntry> files,
                         bool verified)
    : folder_(std::move(folder)),
      prefix_(std::move(prefix)),
      document_(document),
      files_(std::move(files)),
      verified_(verified) {}

void ListedFiles::bad(const std::string &what, const char *remedy) const {
    if (!prefix_.empty()) throw BundleError("its " + what);
    throw BundleError(join("Bundle ", folder_.path().string(), ": ", what, ". ", remedy));
}

File ListedFiles::open(const std::string &name) const {
    const auto entry = files_.find(name);
    if (entry == files_.end()) bad(join(name, " is not listed in ", document_));
    try {
        File file = folder_.open(prefix_ + name);
        if (const std::int64_t size = file.size(); size != entry->second.size_bytes)
            bad(join(name, " has ", size, " bytes; ", document_, " says ", entry->second.size_bytes));
        return file;
    } catch (const UnlikeFile &found) {
        bad(name + (found.link ? " is a link" : " is no regular file"));
    } catch (const std::system_error &error) {
        if (error.code() == std::errc::no_such_file_or_directory) bad(name + " is missing");
        bad(join(name, " cannot be read (", error.what(), ")"));
    }
}

// A file's bytes, whose hash is checked where hashes are.
std::string ListedFiles::hashed(const std::string &name, const File &file) const {
    const FileEntry &entry = files_.at(name);
    if (static_cast<std::uint64_t>(entry.size_bytes) > available_bytes())
        bad(join(name, " of ", entry.size_bytes, " bytes is larger than the memory that is left"),
            "Close other programs, or do without verify, which maps weights.");
    std::string bytes;
    try {
        bytes = file.first(entry.size_bytes);
    } catch (const std::system_error &error) {
        bad(join(name, " cannot be read (", error.what(), ")"));
    }
    if (!verified_) return bytes;
    Sha256 digest;
    digest.update(bytes);
    if (const std::string actual = digest.hex_digest(); actual != entry.sha256)
        bad(join(name, " has been altered: its SHA-256 is ", actual, ", ", document_, " says ",
                 entry.sha256));
    return bytes;
}

std::string ListedFiles::text(const std::string &name) const {
    const File file = open(name);
    if (const std::int64_t size = file.size(); size > MOST_BYTES)
        bad(join(name, " is ", size, " bytes long; at most ", MOST_BYTES, " are read"));
    std::string text = hashed(name, file);
    if (!is_utf8(text)) bad(name + " is not UTF-8 text");
    return text;
}

MappedFile ListedFiles::mapped(const std::string &name, const File &file) const {
    try {
        return MappedFile(file);
    } catch (const std::system_error &error) {
        bad(join(name, " cannot be read (", error.what(), ")"));
    }
}

Content ListedFiles::content(const std::string &name) const {
    const File file = open(name);
    return verified_ ? Content(hashed(name, file)) : Content(mapped(name, file));
}

// The listed file that a graph means by a location; it lies beside the graph or below it.
std::string ListedFiles::beside(const std::string &name, const std::string &location) const {
    const std::size_t slash = name.rfind('/');
    return (slash == std::string::npos ? "" : name.substr(0, slash + 1)) + location;
}

// Where a graph's weights lie, by what it calls that, each checked.
std::set<std::string> ListedFiles::locations(const std::string &name, std::string_view model) const {
    std::vector<ExternalData> found;
    try {
        found = external_data_from_bytes(model);
    } catch (const MalformedError &error) {
        bad(join(name, " is not a readable ONNX model: ", error.what()));
    }
    std::set<std::string> locations;
    for (const ExternalData &data : found) {
        const auto listed = files_.find(beside(name, data.location));
        if (listed == files_.end())
            bad(join(name, " reads tensor '", data.tensor, "' from '", data.location, "', which ", document_, " does not list"));
        const auto size = static_cast<std::uint64_t>(listed->second.size_bytes), length = data.length.value_or(0);
        if (data.offset > size || length > size - data.offset)
            bad(join(name, " reads tensor '", data.tensor, "' beyond the ", size, " bytes of '", data.location, "'"));
        locations.insert(data.location);
    }
    return locations;
}

void ListedFiles::check_graph(const std::string &name) const { locations(name, mapped(name, open(name)).bytes()); }

GraphFiles ListedFiles::graph(const std::string &name) const {
    const fs::path folder = folder_.path() / prefix_;
    GraphFiles graph{folder / name, verified_, "", {}, {}};
    const File model = open(name);
    if (verified_) graph.model = hashed(name, model);
    for (const std::string &location : locations(name, verified_ ? graph.model : mapped(name, model).bytes())) {
        const std::string data = beside(name, location);
        const File file = open(data);
        if (verified_)
            graph.data.emplace(location, hashed(data, file));
        else
            graph.watched.push_back({folder / data, file.identity()});
    }
    return graph;
}

void ListedFiles::check_sizes(const std::map<std::string, std::int64_t> &present) const {
    for (const auto &[name, entry] : files_) {
        const auto found = present.find(name);
        if (found == present.end()) bad(name + " is missing");
        if (found->second != entry.size_bytes)
            bad(join(name, " has ", found->second, " bytes; ", document_, " says ", entry.size_bytes));
    }
}

void ListedFiles::check_hashes() const {
    for (const auto &[name, entry] : files_) {
        std::string actual;
        try {
            actual = open(name).sha256();
        } catch (const std::system_error &error) {
            bad(join(name, " cannot be read (", error.what(), ")"));
        }
        if (actual != entry.sha256) bad(join(name, " has been altered: its SHA-256 is ", actual, ", ", document_, " says ",
                 entry.sha256));
    }
}

}  // namespace ldm::runtime
