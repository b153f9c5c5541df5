// ldm.h on the library: checks of what the caller gives, and no exception that crosses C.
#include "draw.hpp"
#include "error.hpp"
#include "noise.hpp"
#include "unicode.hpp"

#include <ldm/ldm.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>

#define LDM_TEXT_OF(value) #value
#define LDM_VERSION_TEXT(major, minor, patch) LDM_TEXT_OF(major) "." LDM_TEXT_OF(minor) "." LDM_TEXT_OF(patch)

using namespace ldm::runtime;

struct ldm_pipeline {
    explicit ldm_pipeline(std::shared_ptr<Model> shared) : model(std::move(shared)) {}

    std::shared_ptr<Model> model;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    std::set<std::string> backends;  // what ldm_info has pointed to
};

struct ldm_preview {
    const std::function<Tensor()> &decode;
    std::size_t bytes;  // of what it gives
};

namespace {

constexpr std::int32_t MOST_THREADS = 1024;  // ONNX Runtime starts as many as it is given, for each graph

constexpr const char *OUT_OF_MEMORY = "Out of memory. Close other programs, or ask for fewer or smaller pictures.";

thread_local std::string message_text;
thread_local const char *message = "";

// A sentence as it may be shown: its parts need not be UTF-8, may be control characters, and may be very long.
std::string shown(const std::string &sentence) {
    constexpr std::size_t start = 800, end = 300;
    std::u32string text = decoded(sentence);
    if (text.size() > start + end) text = text.substr(0, start) + U" ... " + text.substr(text.size() - end);
    std::replace_if(text.begin(), text.end(), [](char32_t c) { return c < 0x20 || (c >= 0x7F && c < 0xA0); }, U'?');
    return encoded(text);
}

ldm_status failed(ldm_status status, const char *sentence) noexcept {
    try {
        message_text = shown(sentence);
        message = message_text.c_str();
    } catch (...) {
        message = OUT_OF_MEMORY;
    }
    return status;
}

// Run what a function of ldm.h does, and turn what it throws into a status and a sentence.
template <class Action>
ldm_status guarded(const Action &action) noexcept {
    message = "";
    try {
        action();
        return LDM_OK;
    } catch (const Error &error) {
        return failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        message = OUT_OF_MEMORY;
        return LDM_ERROR_MEMORY;
    } catch (const std::length_error &) {
        message = OUT_OF_MEMORY;
        return LDM_ERROR_MEMORY;
    } catch (const std::exception &error) {
        return failed(LDM_ERROR_INTERNAL, error.what());
    } catch (...) {
        return failed(LDM_ERROR_INTERNAL, "An unknown exception was thrown. Please report it.");
    }
}

// The pipelines that are open, so that one which was closed is refused and not read. Never destroyed: a caller may close
// pipelines while the program ends.
struct Registry {
    std::mutex mutex;
    std::unordered_map<const ldm_pipeline *, std::shared_ptr<ldm_pipeline>> open;
};

Registry &registry() {
    static Registry &only = *new Registry;
    return only;
}

ldm_pipeline *registered(std::shared_ptr<Model> model) {
    auto pipeline = std::make_shared<ldm_pipeline>(std::move(model));
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().open.emplace(pipeline.get(), pipeline);
    return pipeline.get();
}

// A pipeline in use: it stays alive although it is closed meanwhile, and is refused to other threads.
class Use {
  public:
    explicit Use(const ldm_pipeline *handle) {
        {
            const std::lock_guard<std::mutex> lock(registry().mutex);
            const auto found = registry().open.find(handle);
            if (found != registry().open.end()) pipeline_ = found->second;
        }
        if (pipeline_ == nullptr) throw InputError("The pipeline is NULL or was closed. Open one with ldm_pipeline_open.");
        if (pipeline_->busy.test_and_set(std::memory_order_acquire))
            throw InputError("The pipeline is in use. Give each thread a clone of its own.");
    }
    ~Use() { pipeline_->busy.clear(std::memory_order_release); }
    Use(const Use &) = delete;
    Use &operator=(const Use &) = delete;

    ldm_pipeline *operator->() const { return pipeline_.get(); }
    Model &model() const { return *pipeline_->model; }

  private:
    std::shared_ptr<ldm_pipeline> pipeline_;
};

template <class T>
T &needed(T *pointer, const char *name) {
    if (pointer == nullptr) throw InputError(std::string(name) + " is NULL; it is needed.");
    return *pointer;
}

// Sizes of structures of this kind, older and newer ones: none cuts through a member.
template <class T>
void check_size(std::size_t struct_size) {
    if (struct_size < sizeof struct_size || struct_size > 4096 || struct_size % alignof(T) != 0)
        throw InputError(join("struct_size is ", struct_size, "; it is sizeof the structure. Use its _init function."));
}

// The caller's structure as this library knows it: what the caller does not have stays at its default.
template <class T>
T completed(const T *given, const T &defaults) {
    T whole = defaults;
    if (given == nullptr) return whole;
    check_size<T>(given->struct_size);
    std::memcpy(&whole, given, std::min(given->struct_size, sizeof whole));
    return whole;
}

// Give the caller as much of a structure as it has room for.
template <class T>
void give(const T &whole, T *to, std::size_t struct_size) {
    check_size<T>(struct_size);
    std::memset(to, 0, struct_size);
    std::memcpy(to, &whole, std::min(struct_size, sizeof whole));
    to->struct_size = struct_size;
}

ldm_open_options open_defaults() {
    ldm_open_options options{};
    options.struct_size = sizeof options;
    options.backend = "auto";
    return options;
}

ldm_draw_options draw_defaults() {
    ldm_draw_options options{};
    options.struct_size = sizeof options;
    options.guidance = std::nan("");
    options.image_count = 1;
    options.strength = std::nan("");
    options.mask_count = 1;
    options.image_guidance = std::nan("");
    options.deepcache = 1;
    return options;
}

// Call what the caller gave, whose exceptions must not cross C.
template <class Action>
auto calling(const char *which, const Action &action) {
    try {
        return action();
    } catch (const std::exception &error) {
        throw CallbackError(join("The ", which, " callback threw an exception: ", error.what(), ". Catch it there."));
    } catch (...) {
        throw CallbackError(join("The ", which, " callback threw an exception. Catch it there."));
    }
}

// Tell how many there are; whether the caller wants them, and has room.
bool wants(std::size_t count, const void *buffer, std::size_t *room, const char *unit) {
    const std::size_t there = std::exchange(*room, count);
    if (buffer != nullptr && there < count)
        throw BufferError(join("The buffer has room for ", there, " ", unit, "; ", count, " are needed. Give a larger one."));
    return buffer != nullptr;
}

void call_back(const ldm_draw_options &options, const Step &step, std::size_t picture_bytes) {
    if (options.step == nullptr) return;
    const ldm_preview preview{step.decode, picture_bytes};
    ldm_step now{};
    now.struct_size = sizeof now;
    now.index = static_cast<std::uint32_t>(step.index);
    now.count = static_cast<std::uint32_t>(step.count);
    now.timestep = step.timestep;
    now.latents = step.latents.as<float>();
    std::copy(step.latents.shape.begin(), step.latents.shape.end(), std::begin(now.latents_shape));
    now.preview = &preview;
    const int stop = calling("step", [&] { return options.step(&now, options.step_user); });
    if (stop != 0) throw CancelledError(join("Cancelled after step ", step.index + 1, " of ", step.count, "."));
}

}  // namespace

extern "C" {

const char *ldm_version(void) {
    return LDM_VERSION_TEXT(LDM_VERSION_MAJOR, LDM_VERSION_MINOR, LDM_VERSION_PATCH);
}

const char *ldm_last_error(void) { return message; }

ldm_status ldm_open_options_init(ldm_open_options *options, size_t struct_size) {
    return guarded([&] { give(open_defaults(), &needed(options, "options"), struct_size); });
}

ldm_status ldm_draw_options_init(ldm_draw_options *options, size_t struct_size) {
    return guarded([&] { give(draw_defaults(), &needed(options, "options"), struct_size); });
}

ldm_status ldm_pipeline_open(const char *folder, const ldm_open_options *options, ldm_pipeline **pipeline) {
    return guarded([&] {
        needed(pipeline, "pipeline") = nullptr;
        const ldm_open_options asked = completed(options, open_defaults());
        if (asked.threads < 0 || asked.threads > MOST_THREADS)
            throw InputError(join("threads is ", asked.threads, "; give 0, which is one a physical core, to ", MOST_THREADS,
                                  "."));
        const auto warn = [tell = asked.warning, user = asked.warning_user](const std::string &sentence) {
            if (tell == nullptr) return;
            const std::string text = shown(sentence);
            calling("warning", [&] { tell(text.c_str(), user); });
        };
        *pipeline = registered(std::make_shared<Model>(&needed(folder, "folder"), &needed(asked.backend, "backend"),
                                                       asked.threads, asked.verify != 0, warn));
    });
}

ldm_status ldm_pipeline_clone(ldm_pipeline *pipeline, ldm_pipeline **clone) {
    return guarded([&] {
        needed(clone, "clone") = nullptr;
        *clone = registered(Use(pipeline)->model);
    });
}

void ldm_pipeline_close(ldm_pipeline *pipeline) {
    guarded([&] {
        std::shared_ptr<ldm_pipeline> last;  // released after the lock is
        const std::lock_guard<std::mutex> lock(registry().mutex);
        const auto found = registry().open.find(pipeline);
        if (found == registry().open.end()) return;
        last = std::move(found->second);
        registry().open.erase(found);
    });
}

ldm_status ldm_pipeline_info(ldm_pipeline *pipeline, ldm_info *info) {
    return guarded([&] {
        const Use use(pipeline);
        needed(info, "info");
        const Facts &facts = use.model().facts();
        const Tokenizers &tokenizers = use.model().tokenizers();
        ldm_info found{};
        found.backend = use->backends.insert(use.model().backend()).first->c_str();
        found.height = facts.height;
        found.width = facts.width;
        found.channels = facts.picture_channels;
        found.latent_channels = facts.latent_channels;
        found.pixels_per_latent = facts.pixels_per_latent;
        found.reads_text = facts.reads_text;
        found.class_count = facts.class_count;
        found.token_count = tokenizers.empty() ? 0 : static_cast<std::uint32_t>(tokenizers[0]->max_length());
        found.default_sampler = facts.default_sampler.c_str();
        found.default_steps = facts.default_steps;
        found.default_guidance = facts.guidance.scale;
        give(found, info, info->struct_size);
    });
}

ldm_status ldm_draw(ldm_pipeline *pipeline, const char *const *prompts, size_t count, const ldm_draw_options *options,
                    uint8_t *pixels, size_t *bytes) {
    return guarded([&] {
        needed(bytes, "bytes");
        const Use use(pipeline);
        const Facts &facts = use.model().facts();
        const ldm_draw_options asked = completed(options, draw_defaults());
        const Request request = checked_request(use.model().bundle(), facts, prompts, count, asked);
        const std::size_t size = count_of({static_cast<std::int64_t>(count), request.height, request.width,
                                           static_cast<std::int64_t>(facts.picture_channels)});
        if (!wants(size, pixels, bytes, "bytes")) return;
        const Tensor images = draw(use.model(), request, [&](const Step &step) { call_back(asked, step, size); });
        std::memcpy(pixels, images.data.data(), size);
    });
}

ldm_status ldm_step_preview(const ldm_step *step, uint8_t *pixels, size_t *bytes) {
    return guarded([&] {
        needed(bytes, "bytes");
        const ldm_preview &preview = needed(needed(step, "step").preview, "step->preview");
        if (wants(preview.bytes, pixels, bytes, "bytes"))
            std::memcpy(pixels, preview.decode().data.data(), preview.bytes);
    });
}

ldm_status ldm_tokenize(ldm_pipeline *pipeline, const char *prompt, int64_t *ids, size_t *count) {
    return guarded([&] {
        needed(count, "count");
        const Use use(pipeline);
        const Tokenizers &tokenizers = use.model().tokenizers();
        if (tokenizers.empty()) throw InputError("This model reads no text, so there is nothing to tokenize.");
        const std::vector<TokenId> found =
            (*tokenizers[0])(&needed(prompt, "prompt"), [&](const std::string &sentence) { use.model().warn(sentence); });
        if (wants(found.size(), ids, count, "ids")) std::copy(found.begin(), found.end(), ids);
    });
}

ldm_status ldm_noise(int64_t seed, float *values, size_t count) {
    return guarded([&] {
        if (count > 0) Generator(seed).randn(&needed(values, "values"), count);
    });
}

}  // extern "C"
