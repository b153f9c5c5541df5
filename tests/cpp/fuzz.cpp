// What a bundle or a caller may hold that this library parses itself: no input may crash it. The first byte chooses.
#include "error.hpp"
#include "manifest.hpp"
#include "onnx_wire.hpp"
#include "plan.hpp"
#include "tokenizer.hpp"

#include <cstdlib>

using namespace ldm::runtime;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    static const Tokenizer tokenizer(std::getenv("LDM_TEST_TOKENIZER"));
    if (size == 0) return 0;
    const std::string_view text(reinterpret_cast<const char *>(data) + 1, size - 1);
    try {
        switch (data[0] % 4) {
            case 0: manifest_from_json(text); break;
            case 1: plan_from_json(text).for_strength(0.5); break;
            case 2: external_data_from_bytes(text); break;
            default:
                if (tokenizer(text, [](const std::string &) {}).size() != tokenizer.max_length()) std::abort();
        }
    } catch (const Error &) {
    } catch (const MalformedError &) {
    }
    return 0;
}
