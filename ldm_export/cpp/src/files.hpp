// Files of a bundle: their sizes, contents and hashes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>

namespace ldm::runtime {

namespace fs = std::filesystem;

// The text of a file, which must be UTF-8; throws std::system_error or, where it is not UTF-8, MalformedError.
std::string read_text(const fs::path &file);

// A file's bytes, mapped into memory; throws std::system_error, also for an empty file.
class MappedFile {
  public:
    explicit MappedFile(const fs::path &file);
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;
    std::string_view bytes() const { return {static_cast<const char *>(start_), size_}; }

  private:
    void *start_;
    std::size_t size_;
};

// What lies in a folder; nothing where that cannot be opened.
std::set<std::string> names_in(const fs::path &folder);

// The size of every file below a folder by its path with /, without what lies in `leave_out`.
//
// Throws UnlikeFile for a link, a pipe or a device, and std::system_error if the folder cannot be read.
std::map<std::string, std::int64_t> walk(const fs::path &folder, const std::string &leave_out = "");

struct UnlikeFile {
    std::string relative;
    bool link;
};

}  // namespace ldm::runtime
