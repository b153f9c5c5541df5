// What a bundle or a caller may hold that this library parses itself: no input may crash it. The first byte chooses.
#include "compiler.hpp"
#include "engines.hpp"
#include "forecast.hpp"
#include "json.hpp"
#include "onnx_wire.hpp"
#include "request.hpp"
#include "samplers.hpp"
#include "target.hpp"
#include "tokenizer.hpp"
#include "unicode.hpp"

#include <array>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>

using namespace ldm::runtime;

namespace {

void require(bool holds) {
    if (!holds) std::abort();
}

// A manifest, its facts, and a request for what it says of itself.
void read_manifest(std::string_view text) {
    const Manifest manifest = manifest_from_json(text);
    const Bundle bundle{manifest, {Folder("/nowhere"), "", MANIFEST, manifest.files, false}};
    const Facts facts = facts_of(bundle);
    const char *prompt = "a";
    const std::int64_t label = 0;
    ldm_draw_options options{};
    options.guidance = options.strength = options.image_guidance = std::nan("");
    options.deepcache = 1;
    if (facts.takes_classes) options.class_labels = &label;
    checked_request(bundle, facts, facts.reads_text ? &prompt : nullptr, 1, options);
}

// Run a plan from each of its steps.
void run(const Plan &plan) {
    try {
        row_levels(plan, 0);
    } catch (const InputError &error) {
        require(is_utf8(error.what()));
    }
    constexpr std::size_t count = 3;
    const std::array<float, count> output{1.0f, -2.0f, 0.5f};
    for (std::size_t start = 0; start < plan.num_inference_steps; ++start) {
        std::array<float, count> latents = output;
        const Trajectory run = plan.starting_at(start);
        Stepper stepper(run.rows, latents.data(), count);
        for (const Row &row : run.rows) stepper.advance(row, output.data(), [&] { return output.data(); });
    }
}

// Compile a scheduler config for the sampler, with some of its calls or all, and the number of steps that the first two bytes
// say.
void compile(std::string_view text) {
    if (text.size() < 2) return;
    const std::size_t first = static_cast<unsigned char>(text[0]), calls = first / samplers().size();
    const std::string sampler = samplers()[first % samplers().size()].name + (calls == 0 ? "" : join(CALLS, calls));
    const std::int64_t steps = static_cast<unsigned char>(text[1]);
    text.remove_prefix(2);
    if (!is_utf8(text)) throw MalformedError("not UTF-8 text");
    const Json config = parsed(text, Repeats::refused, Constants::allowed);
    if (!config.is(Kind::object)) throw MalformedError("no JSON object");
    try {
        run(compile_plan(config, sampler, steps));
    } catch (const InputError &error) {
        require(is_utf8(error.what()));
    }
}

void tokenize(const Tokenizer &tokenizer, std::string_view prompt) {
    const std::vector<TokenId> ids = tokenizer(prompt, [](const std::string &told) { require(is_utf8(told)); });
    require(ids.size() == tokenizer.max_length());
}

// A prompt and the files of a tokenizer, a zero byte before each; one that is empty is not there. It is CLIP's where it has
// a tokenizer_config.json.
void read_tokenizer(std::string_view text) {
    const auto next = [&] {
        const std::string_view piece = text.substr(0, text.find('\0'));
        text.remove_prefix(std::min(piece.size() + 1, text.size()));
        return piece;
    };
    const std::string_view prompt = next();
    std::map<std::string, std::string> files;
    for (const char *name : {"tokenizer_config.json", "merges.txt", "vocab.json", "special_tokens_map.json",
                             "added_tokens.json", "tokenizer.json"})
        if (const std::string_view content = next(); !content.empty()) {
            if (!is_utf8(content)) throw MalformedError("not UTF-8 text");
            files.emplace(name, content);
        }
    const TokenizerFiles read{"tokenizer", [&](const std::string &name) {
        const auto found = files.find(name);
        return found == files.end() ? std::nullopt : std::optional<std::string>(found->second);
    }};
    const bool has_clip = files.count("tokenizer_config.json") != 0;
    tokenize(*open_tokenizer(TOKENIZER_KINDS[has_clip ? 0 : 1], read), prompt);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const auto read = [](const std::string &name) -> std::optional<std::string> {
        std::ifstream stream(fs::path(std::getenv("LDM_TEST_TOKENIZER")) / name, std::ios::binary);
        if (!stream) return std::nullopt;
        return std::string(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    };
    static const auto tokenizer = open_tokenizer("clip", {"tokenizer", read});
    if (size == 0) return 0;
    const std::string_view text(reinterpret_cast<const char *>(data) + 1, size - 1);
    try {
        switch (data[0] % 8) {
            case 0: read_manifest(text); break;
            case 1: run(plan_from_json(text)); break;
            case 2: external_data_from_bytes(text); break;
            case 3: target_from_json(text); break;
            case 4: read_tokenizer(text); break;
            case 5: tokenize(*tokenizer, text); break;
            case 6: engines_from_json(text, "rtx-sm89"); break;
            default: compile(text);
        }
    } catch (const Error &) {
    } catch (const MalformedError &) {
    }
    return 0;
}
