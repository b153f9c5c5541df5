#include "files.hpp"

#include "sha256.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace ldm::runtime {

namespace {

constexpr std::size_t CHUNK_BYTES = 1 << 20;

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

// Read some bytes at a place, all of them unless the file ends before; how many there were.
std::size_t read_at(const File &file, char *to, std::size_t size, std::size_t offset) {
    std::size_t done = 0;
    while (done < size) {
        const ssize_t got = ::pread(file.descriptor(), to + done, size - done, static_cast<off_t>(offset + done));
        if (got < 0 && errno != EINTR) fail(file.name(), errno);
        if (got == 0) break;
        done += got > 0 ? static_cast<std::size_t>(got) : 0;
    }
    return done;
}

}  // namespace

Identity::Identity(const struct stat &status)
    : device(static_cast<std::uint64_t>(status.st_dev)),
      inode(static_cast<std::uint64_t>(status.st_ino)),
      size(static_cast<std::int64_t>(status.st_size)),
#if defined(__APPLE__)
      seconds(status.st_mtimespec.tv_sec),
      nanoseconds(status.st_mtimespec.tv_nsec) {
#else
      seconds(status.st_mtim.tv_sec),
      nanoseconds(status.st_mtim.tv_nsec) {
#endif
}

bool Identity::operator==(const Identity &other) const {
    return std::tie(device, inode, size, seconds, nanoseconds) ==
           std::tie(other.device, other.inode, other.size, other.seconds, other.nanoseconds);
}

std::optional<Identity> identity_of(const fs::path &file) {
    struct stat status {};
    return ::stat(file.c_str(), &status) == 0 ? std::optional<Identity>(status) : std::nullopt;
}

File::File(int descriptor, std::string name) : descriptor_(descriptor), name_(std::move(name)) {}

File::File(File &&other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)), name_(std::move(other.name_)) {}

File::~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

Identity File::identity() const {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) fail(name_, errno);
    return Identity(status);
}

std::string File::first(std::int64_t size) const {
    std::string bytes(static_cast<std::size_t>(size), '\0');
    if (read_at(*this, bytes.data(), bytes.size(), 0) != bytes.size()) fail(name_, EIO);
    return bytes;
}

std::string File::sha256() const {
    Sha256 digest;
    std::string chunk(CHUNK_BYTES, '\0');
    for (std::size_t offset = 0;;) {
        const std::size_t got = read_at(*this, chunk.data(), chunk.size(), offset);
        if (got == 0) return digest.hex_digest();
        digest.update(std::string_view(chunk).substr(0, got));
        offset += got;
    }
}

MappedFile::MappedFile(const File &file) : size_(static_cast<std::size_t>(file.size())) {
    start_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
    if (start_ == MAP_FAILED) fail(file.name(), errno);
}

MappedFile::MappedFile(MappedFile &&other) noexcept : start_(std::exchange(other.start_, nullptr)), size_(other.size_) {}

MappedFile::~MappedFile() {
    if (start_ != nullptr) ::munmap(start_, size_);
}

Folder::Folder(fs::path path) : path_(std::move(path)) {
    std::error_code missing;
    const fs::path real = fs::canonical(path_, missing);
    if (!missing && real.parent_path().filename() == "snapshots")
        blobs_ = fs::canonical(real.parent_path().parent_path() / "blobs", missing);
}

// Of a link to a blob where that lies.
std::optional<fs::path> Folder::blob(const std::string &relative) const {
    std::error_code missing;
    const fs::path real = blobs_.empty() ? fs::path() : fs::canonical(path_ / relative, missing);
    if (missing || real.empty() || real.parent_path() != blobs_ || !fs::is_regular_file(real, missing)) return std::nullopt;
    return real;
}

// The descriptor of a folder that is reached without a link.
int Folder::open_folder(const std::string &relative) const {
    constexpr int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
    int folder = ::open(path_.c_str(), flags);
    for (const fs::path &part : fs::path(relative)) {
        if (folder < 0 || part.empty()) continue;
        const int inner = ::openat(folder, part.c_str(), flags | O_NOFOLLOW);
        const int code = errno;
        ::close(folder);
        errno = code;
        folder = inner;
    }
    if (folder >= 0) return folder;
    if (errno == ELOOP || (errno == ENOTDIR && !relative.empty())) throw UnlikeFile{relative, true};  // ENOTDIR: on Linux
    fail(path_ / relative, errno);
}

File Folder::open(const std::string &relative) const {
    constexpr int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;  // else a pipe would be waited for
    const fs::path name(relative);
    const int folder = open_folder(name.parent_path().string());
    int descriptor = ::openat(folder, name.filename().c_str(), flags);
    const int code = errno;
    ::close(folder);
    if (descriptor < 0 && code != ELOOP) fail(name, code);
    if (descriptor < 0) {
        const std::optional<fs::path> target = blob(relative);
        if (!target) throw UnlikeFile{relative, true};
        descriptor = ::open(target->c_str(), flags);
        if (descriptor < 0) fail(name, errno);
    }
    File file(descriptor, relative);
    struct stat status {};
    if (::fstat(descriptor, &status) != 0) fail(name, errno);
    if (!S_ISREG(status.st_mode)) throw UnlikeFile{relative, false};
    return file;
}

std::map<std::string, std::int64_t> Folder::walk(const std::string &start, const std::string &leave_out) const {
    std::map<std::string, std::int64_t> found;
    std::vector<std::string> waiting{start.empty() ? "" : start + "/"};
    const std::size_t outside = waiting[0].size();
    while (!waiting.empty()) {
        const std::string prefix = waiting.back();
        waiting.pop_back();
        const int folder = open_folder(prefix);
        const std::unique_ptr<DIR, Close> directory(::fdopendir(folder));
        if (directory == nullptr) {
            const int code = errno;
            ::close(folder);
            fail(path_ / prefix, code);
        }
        while (const dirent *entry = next(directory.get(), path_ / prefix)) {
            const std::string relative = prefix + entry->d_name;
            if (relative == leave_out) continue;
            struct stat status {};
            if (::fstatat(folder, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) fail(path_ / relative, errno);
            if (S_ISLNK(status.st_mode))
                if (const std::optional<fs::path> target = blob(relative); !target || ::stat(target->c_str(), &status) != 0)
                    throw UnlikeFile{relative, true};
            if (S_ISDIR(status.st_mode))
                waiting.push_back(relative + "/");
            else if (S_ISREG(status.st_mode))
                found.emplace(relative.substr(outside), static_cast<std::int64_t>(status.st_size));
            else
                throw UnlikeFile{relative, false};
        }
    }
    return found;
}

std::set<std::string> names_in(const fs::path &folder) {
    std::set<std::string> names;
    const std::unique_ptr<DIR, Close> directory(::opendir(folder.c_str()));
    if (directory == nullptr) return names;
    while (const dirent *entry = next(directory.get(), folder)) names.insert(entry->d_name);
    return names;
}

}  // namespace ldm::runtime
