#include "files.hpp"

#include "json.hpp"
#include "unicode.hpp"

#include <cerrno>
#include <fstream>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace ldm::runtime {

namespace {

[[noreturn]] void fail(const fs::path &file, int code) {
    throw std::system_error(code, std::generic_category(), file.filename().string());
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

std::map<std::string, std::int64_t> walk(const fs::path &folder, const std::string &leave_out) {
    std::map<std::string, std::int64_t> found;
    std::vector<std::string> waiting{""};
    while (!waiting.empty()) {
        const std::string prefix = waiting.back();
        waiting.pop_back();
        for (const fs::directory_entry &entry : fs::directory_iterator(folder / prefix)) {
            const std::string relative = prefix + entry.path().filename().string();
            if (relative == leave_out) continue;
            const fs::file_status status = entry.symlink_status();
            if (fs::is_directory(status))
                waiting.push_back(relative + "/");
            else if (fs::is_regular_file(status))
                found.emplace(relative, static_cast<std::int64_t>(entry.file_size()));
            else
                throw UnlikeFile{relative, fs::is_symlink(status)};
        }
    }
    return found;
}

}  // namespace ldm::runtime
