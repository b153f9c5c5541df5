// The bundle on disk. Opening one trusts nothing in it; as ldm_export/bundle.py.
#pragma once

#include "files.hpp"
#include "manifest.hpp"

namespace ldm::runtime {

struct Bundle {
    fs::path path;
    Manifest manifest;
    bool verified;

    // Throws BundleError if anything is missing, altered, malformed or reaches outside the folder; `verify` hashes every
    // listed file too, and refuses files that are not listed.
    static Bundle open(const fs::path &folder, bool verify);

    bool has(const std::string &relative) const { return manifest.files.count(relative) != 0; }
    fs::path file(const std::string &relative) const { return path / relative; }
};

// A file's SHA-256; throws std::system_error.
std::string sha256_of(const fs::path &file);

}  // namespace ldm::runtime
