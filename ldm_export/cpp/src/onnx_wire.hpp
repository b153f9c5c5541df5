// Which files an ONNX model reads its weights from, found without reading the weights; as ldm_export/bundle/onnx_wire.py.
#pragma once

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

// Every reference in the bytes of a model, in order.
//
// Throws MalformedError where they are no ONNX model, where two readers of protobuf could take them for different ones, where
// a node reads files on its own, and where the model, its functions inlined as ONNX Runtime does it, has more than 2**17 nodes.
std::vector<ExternalData> external_data_from_bytes(std::string_view model);

}  // namespace ldm::runtime
