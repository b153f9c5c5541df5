// Files that a document lists with their sizes and hashes, and that are read in one way only.
//
// A file is opened below its folder without following a link, must be regular and of the size that is listed, and where the
// hashes are to be verified, the hash is taken of the bytes that are used.
#pragma once

#include "files.hpp"
#include "json.hpp"

#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace ldm::runtime {

// A file's bytes: verified ones are a copy of their own, others are mapped.
class Content {
  public:
    explicit Content(std::string verified) : bytes_(std::move(verified)) {}
    explicit Content(MappedFile mapped) : mapped_(std::move(mapped)) {}
    std::string_view bytes() const { return mapped_ ? mapped_->bytes() : bytes_; }

  private:
    std::string bytes_;
    std::optional<MappedFile> mapped_;
};

// A file that is used by its name, as it was when it was checked.
struct Watched {
    fs::path file;
    Identity identity;
};

// A graph and the files that its weights lie in. What is verified is opened from memory, the rest by name.
struct GraphFiles {
    fs::path file;
    bool in_memory;
    std::string model;                        // in memory
    std::map<std::string, std::string> data;  // by the name that the model gives the file, in memory
    std::vector<Watched> watched;             // what is mapped while the graph is open
};

class ListedFiles {
  public:
    // prefix: the folder in `folder` that the names are relative to, "" or such as "targets/ort-cpu/"; document: what
    // lists them, for errors.
    ListedFiles(Folder folder, std::string prefix, const char *document, std::map<std::string, FileEntry> files,
                bool verified);

    bool has(const std::string &name) const { return files_.count(name) != 0; }
    const std::map<std::string, FileEntry> &entries() const { return files_; }
    const Folder &folder() const { return folder_; }
    bool verified() const { return verified_; }

    // The text of a document. These throw BundleError; with a prefix it says "its", the file and what is wrong.
    std::string text(const std::string &name) const;
    Content content(const std::string &name) const;  // of any size
    GraphFiles graph(const std::string &name) const;

    // Check that the weights which a graph reads lie in listed files, and within them.
    void check_graph(const std::string &name) const;

    void check_sizes(const std::map<std::string, std::int64_t> &present) const;  // of files by their names
    void check_hashes() const;

  private:
    [[noreturn]] void bad(const std::string &what, const char *remedy = "Export the bundle anew.") const;
    File open(const std::string &name) const;
    MappedFile mapped(const std::string &name, const File &file) const;
    std::string hashed(const std::string &name, const File &file) const;
    std::set<std::string> locations(const std::string &name, std::string_view model) const;
    std::string beside(const std::string &name, const std::string &location) const;

    Folder folder_;
    std::string prefix_;
    const char *document_;
    std::map<std::string, FileEntry> files_;
    bool verified_;
};

}  // namespace ldm::runtime
