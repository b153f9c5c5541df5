// Files of a folder that is not trusted: their sizes and contents.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>

struct stat;

namespace ldm::runtime {

namespace fs = std::filesystem;

constexpr std::int64_t MOST_BYTES = 64 << 20;  // of a document that is read; as ldm_export/reading/documents.py

// What is neither a file nor a folder.
struct UnlikeFile {
    std::string relative;
    bool link;
};

// What tells whether a file is the one that it was.
struct Identity {
    std::uint64_t device, inode;
    std::int64_t size, seconds, nanoseconds;

    explicit Identity(const struct stat &status);
    bool operator==(const Identity &other) const;
};

std::optional<Identity> identity_of(const fs::path &file);  // none where it is not there; a link is followed

// A regular file, opened. Reading throws std::system_error.
class File {
  public:
    File(int descriptor, std::string name);  // takes the descriptor over
    File(File &&other) noexcept;
    ~File();

    std::int64_t size() const { return identity().size; }
    Identity identity() const;
    int descriptor() const { return descriptor_; }
    const std::string &name() const { return name_; }

    std::string first(std::int64_t size) const;  // so many bytes from the start; throws std::system_error where it has less
    std::string sha256() const;                  // of all, 64 hex digits

  private:
    int descriptor_;
    std::string name_;
};

// A file's bytes, mapped into memory; throws std::system_error, also for an empty file.
class MappedFile {
  public:
    explicit MappedFile(const File &file);
    MappedFile(MappedFile &&other) noexcept;
    ~MappedFile();
    std::string_view bytes() const { return {static_cast<const char *>(start_), size_}; }

  private:
    void *start_;
    std::size_t size_;
};

// A folder below which no link is followed, with one exception: a snapshot of the Hugging Face cache,
// .../snapshots/<revision>, has links to regular files in .../blobs.
class Folder {
  public:
    explicit Folder(fs::path path);

    const fs::path &path() const { return path_; }

    // Open a file. Throws UnlikeFile where it or a folder on the way is a link, or it is no regular file, and
    // std::system_error.
    File open(const std::string &relative) const;

    // The size of every file below `start`, a folder in this one, or "", by its path with / from there; without what lies
    // in `leave_out`. Throws UnlikeFile for a link, a pipe or a device, and std::system_error if a folder cannot be read.
    std::map<std::string, std::int64_t> walk(const std::string &start = "", const std::string &leave_out = "") const;

  private:
    int open_folder(const std::string &relative) const;
    std::optional<fs::path> blob(const std::string &relative) const;

    fs::path path_, blobs_;  // where links may lead; empty: nowhere
};

// What lies in a folder; nothing where that cannot be opened.
std::set<std::string> names_in(const fs::path &folder);

}  // namespace ldm::runtime
