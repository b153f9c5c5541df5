// The bundle on disk. Opening one trusts nothing in it; as ldm_export/bundle/bundle.py.
#pragma once

#include "listed.hpp"
#include "manifest.hpp"

namespace ldm::runtime {

struct Bundle {
    Manifest manifest;
    ListedFiles files;  // those of the manifest

    // Throws BundleError if anything is missing, altered, malformed or reaches outside the folder; `verify` hashes every
    // listed file too, and refuses files that are not listed, but for hidden ones and README.md.
    static Bundle open(const fs::path &folder, bool verify);

    const fs::path &path() const { return files.folder().path(); }
    bool verified() const { return files.verified(); }
};

}  // namespace ldm::runtime
