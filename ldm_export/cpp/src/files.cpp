#include "files.hpp"

#include "json.hpp"
#include "unicode.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <system_error>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace ldm::runtime {

namespace {

[[noreturn]] void fail(const fs::path &file, int code) {
    throw std::system_error(code, std::generic_category(), file.filename().string());
}

// With readdir, since std::filesystem::directory_iterator ends the process where it runs out of memory.
struct Close {
    void operator()(DIR *directory) const { ::closedir(directory); }
};

// What comes next in a directory, or null.
const dirent *next(DIR *directory, const fs::path &folder) {
    for (;;) {
        errno = 0;
        const dirent *entry = ::readdir(directory);
        if (entry == nullptr && errno != 0) fail(folder, errno);
        if (entry == nullptr || (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0)) return entry;
    }
}

}  // namespace

std::string read_text(const fs::path &file) {
    errno = 0;
    std::ifstream stream(file, std::ios::binary);
    std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    if (!stream) fail(file, errno != 0 ? errno : EIO);
    if (!is_utf8(text)) throw MalformedError("not UTF-8 text");
    return text;
}

MappedFile::MappedFile(const fs::path &file) {
    const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(file, errno);
    struct stat status {};
    const bool told = ::fstat(descriptor, &status) == 0;
    size_ = told ? static_cast<std::size_t>(status.st_size) : 0;
    start_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const int code = errno;
    ::close(descriptor);
    if (start_ == MAP_FAILED) fail(file, code);
}

MappedFile::~MappedFile() { ::munmap(start_, size_); }

std::set<std::string> names_in(const fs::path &folder) {
    std::set<std::string> names;
    const std::unique_ptr<DIR, Close> directory(::opendir(folder.c_str()));
    if (directory == nullptr) return names;
    while (const dirent *entry = next(directory.get(), folder)) names.insert(entry->d_name);
    return names;
}

std::map<std::string, std::int64_t> walk(const fs::path &folder, const std::string &leave_out) {
    std::map<std::string, std::int64_t> found;
    std::vector<std::string> waiting{""};
    while (!waiting.empty()) {
        const std::string prefix = waiting.back();
        waiting.pop_back();
        const std::unique_ptr<DIR, Close> directory(::opendir((folder / prefix).c_str()));
        if (directory == nullptr) fail(folder / prefix, errno);
        while (const dirent *entry = next(directory.get(), folder)) {
            const std::string relative = prefix + entry->d_name;
            if (relative == leave_out) continue;
            struct stat status {};
            if (::fstatat(::dirfd(directory.get()), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0)
                fail(folder / relative, errno);
            if (S_ISDIR(status.st_mode))
                waiting.push_back(relative + "/");
            else if (S_ISREG(status.st_mode))
                found.emplace(relative, static_cast<std::int64_t>(status.st_size));
            else
                throw UnlikeFile{relative, S_ISLNK(status.st_mode)};
        }
    }
    return found;
}

}  // namespace ldm::runtime
