// Which files an ONNX model reads its weights from, found without reading the weights; as ldm_export/onnx_wire.py.
#pragma once

#include "files.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ldm::runtime {

struct ExternalData {
    std::string tensor;    // its name; may be empty
    std::string location;  // as the model names the file; not checked here
    std::uint64_t offset;
    std::optional<std::uint64_t> length;  // none: to the end of the file
};

// Every reference in the bytes of a model, in order; throws MalformedError if they are no ONNX model.
std::vector<ExternalData> external_data_from_bytes(std::string_view model);

// The same of a file; throws BundleError.
std::vector<ExternalData> external_data_from_onnx(const fs::path &file);

}  // namespace ldm::runtime
