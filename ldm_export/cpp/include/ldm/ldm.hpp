// ldm.hpp: ldm.h for C++17, header-only. What fails throws ldm::Error with the sentence of ldm_last_error().
//
//     #include <ldm/ldm.hpp>
//     ldm::Pipeline pipeline("emoji64.bundle");
//     ldm::Pictures pictures = pipeline.draw({"red apple"});       // pixels, count, height, width, channels
#ifndef LDM_LDM_HPP
#define LDM_LDM_HPP

#include "ldm.h"

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ldm {

class Error : public std::runtime_error {
  public:
    Error(ldm_status status, const char *sentence) : std::runtime_error(sentence), status_(status) {}
    ldm_status status() const noexcept { return status_; }

  private:
    ldm_status status_;
};

// A drawing that its callback stopped.
class Cancelled : public Error {
  public:
    using Error::Error;
};

// Throw what a status says; std::bad_alloc for LDM_ERROR_MEMORY.
inline void check(ldm_status status) {
    if (status == LDM_OK) return;
    if (status == LDM_ERROR_MEMORY) throw std::bad_alloc();
    if (status == LDM_ERROR_CANCELLED) throw Cancelled(status, ldm_last_error());
    throw Error(status, ldm_last_error());
}

// uint8 (count, height, width, channels).
struct Pictures {
    std::vector<std::uint8_t> pixels;
    std::size_t count, height, width, channels;
};

// One finished network call; valid during the callback.
class Step {
  public:
    explicit Step(const ldm_step &step) : step_(step) {}

    std::size_t index() const { return step_.index; }
    std::size_t count() const { return step_.count; }
    double timestep() const { return step_.timestep; }
    const float *latents() const { return step_.latents; }  // the live buffer, (B, C, h, w)
    const std::size_t (&latents_shape() const)[4] { return step_.latents_shape; }

    // The latents as pictures, as Pipeline::draw gives them.
    std::vector<std::uint8_t> preview() const {
        std::size_t bytes = 0;
        check(ldm_step_preview(&step_, nullptr, &bytes));
        std::vector<std::uint8_t> pixels(bytes);
        check(ldm_step_preview(&step_, pixels.data(), &bytes));
        return pixels;
    }

  private:
    const ldm_step &step_;
};

// Called after each step; false cancels. What it throws comes out of Pipeline::draw.
using OnStep = std::function<bool(const Step &)>;
using OnWarning = std::function<void(const char *sentence)>;  // what it throws becomes an Error

struct OpenOptions {
    std::string backend = "auto";
    int threads = 0;
    bool verify = false;
    OnWarning warning = nullptr;
};

// A file that ldm-export lora has made for the bundle, for one picture or, with -1, for all.
struct Adapter {
    std::string file;
    double strength = 1.0;
    std::int64_t picture = -1;
};

// Members that are left alone are the bundle's own choice; see ldm_draw_options.
struct DrawOptions {
    std::string sampler = "";
    std::uint32_t steps = 0;
    std::optional<double> guidance = std::nullopt;
    std::vector<std::string> negative_prompts = {};
    std::int64_t seed = 0;
    std::vector<std::int64_t> seeds = {};
    std::uint32_t height = 0, width = 0;
    const std::uint8_t *image = nullptr;
    std::size_t image_count = 1;
    std::optional<double> strength = std::nullopt;
    std::vector<std::int64_t> class_labels = {};
    std::uint32_t deepcache = 1;
    bool whole = false;
    std::uint32_t calls = 0;
    std::vector<Adapter> adapters = {};
    const std::uint8_t *mask = nullptr;
    std::size_t mask_count = 1;
    bool keep_pixels = false;
    std::optional<double> image_guidance = std::nullopt;
    bool prompt_weights = false;
    bool long_prompts = false;
};

// An opened bundle. Moves, does not copy; clone() gives another on the same weights, for another thread.
class Pipeline {
  public:
    explicit Pipeline(const std::string &folder, const OpenOptions &options = {})
        : warning_(options.warning ? std::make_shared<OnWarning>(options.warning) : nullptr) {
        ldm_open_options chosen;
        check(ldm_open_options_init(&chosen, sizeof chosen));
        chosen.backend = options.backend.c_str();
        chosen.threads = options.threads;
        chosen.verify = options.verify;
        chosen.warning = warning_ ? tell : nullptr;
        chosen.warning_user = warning_.get();
        check(ldm_pipeline_open(folder.c_str(), &chosen, &handle_));
    }
    Pipeline(Pipeline &&other) noexcept
        : handle_(std::exchange(other.handle_, nullptr)), warning_(std::move(other.warning_)) {}
    Pipeline &operator=(Pipeline &&other) noexcept {
        std::swap(handle_, other.handle_);
        std::swap(warning_, other.warning_);
        return *this;
    }
    ~Pipeline() { ldm_pipeline_close(handle_); }

    Pipeline clone() const {
        Pipeline other(warning_);
        check(ldm_pipeline_clone(handle_, &other.handle_));
        return other;
    }

    ldm_info info() const {
        ldm_info info;
        info.struct_size = sizeof info;
        check(ldm_pipeline_info(handle_, &info));
        return info;
    }

    // One picture a prompt.
    Pictures draw(const std::vector<std::string> &prompts, const DrawOptions &options = {}, const OnStep &step = nullptr) {
        std::vector<const char *> texts;
        for (const std::string &prompt : prompts) texts.push_back(prompt.c_str());
        return draw(texts.data(), texts.size(), options, step);
    }

    // So many pictures, of a model that reads no text.
    Pictures draw(std::size_t count, const DrawOptions &options = {}, const OnStep &step = nullptr) {
        return draw(nullptr, count, options, step);
    }

    std::vector<std::int64_t> tokenize(const std::string &prompt) const {
        std::size_t count = 0;
        check(ldm_tokenize(handle_, prompt.c_str(), nullptr, &count));
        std::vector<std::int64_t> ids(count);
        check(ldm_tokenize(handle_, prompt.c_str(), ids.data(), &count));
        return ids;
    }

    ldm_pipeline *get() const noexcept { return handle_; }

  private:
    struct Watch {
        const OnStep &step;
        std::exception_ptr thrown;
    };

    explicit Pipeline(std::shared_ptr<OnWarning> warning) : warning_(std::move(warning)) {}

    static void tell(const char *sentence, void *warning) { (*static_cast<OnWarning *>(warning))(sentence); }

    static int watch(const ldm_step *step, void *user) noexcept {
        Watch &watch = *static_cast<Watch *>(user);
        try {
            return watch.step(Step(*step)) ? 0 : 1;
        } catch (...) {
            watch.thrown = std::current_exception();
            return 1;
        }
    }

    Pictures draw(const char *const *prompts, std::size_t count, const DrawOptions &options, const OnStep &step) {
        std::vector<const char *> negatives;
        for (const std::string &prompt : options.negative_prompts) negatives.push_back(prompt.c_str());
        if (!options.seeds.empty() && options.seeds.size() != count)
            throw Error(LDM_ERROR_INPUT, "There are not as many seeds as pictures. Give one each.");
        if (!options.class_labels.empty() && options.class_labels.size() != count)
            throw Error(LDM_ERROR_INPUT, "There are not as many class labels as pictures. Give one each.");
        Watch watched{step, nullptr};
        ldm_draw_options chosen;
        check(ldm_draw_options_init(&chosen, sizeof chosen));
        chosen.sampler = options.sampler.empty() ? nullptr : options.sampler.c_str();
        chosen.steps = options.steps;
        if (options.guidance) chosen.guidance = *options.guidance;
        chosen.negative_prompts = negatives.empty() ? nullptr : negatives.data();
        chosen.negative_prompt_count = negatives.size();
        chosen.seed = options.seed;
        chosen.seeds = options.seeds.empty() ? nullptr : options.seeds.data();
        chosen.height = options.height;
        chosen.width = options.width;
        chosen.image = options.image;
        chosen.image_count = options.image_count;
        if (options.strength) chosen.strength = *options.strength;
        chosen.class_labels = options.class_labels.empty() ? nullptr : options.class_labels.data();
        chosen.deepcache = options.deepcache;
        chosen.whole = options.whole;
        chosen.calls = options.calls;
        std::vector<const char *> files;
        std::vector<double> strengths;
        std::vector<std::int64_t> pictures_of;
        for (const Adapter &adapter : options.adapters) {
            files.push_back(adapter.file.c_str());
            strengths.push_back(adapter.strength);
            pictures_of.push_back(adapter.picture);
        }
        chosen.adapters = files.data();
        chosen.adapter_strengths = strengths.data();
        chosen.adapter_pictures = pictures_of.data();
        chosen.adapter_count = files.size();
        chosen.mask = options.mask;
        chosen.mask_count = options.mask_count;
        chosen.keep_pixels = options.keep_pixels;
        if (options.image_guidance) chosen.image_guidance = *options.image_guidance;
        chosen.prompt_weights = options.prompt_weights;
        chosen.long_prompts = options.long_prompts;
        chosen.step = step ? watch : nullptr;
        chosen.step_user = &watched;
        const ldm_info model = info();
        Pictures pictures{{}, count, options.height != 0 ? options.height : model.height,
                          options.width != 0 ? options.width : model.width, model.channels};
        std::size_t bytes = 0;
        check(ldm_draw(handle_, prompts, count, &chosen, nullptr, &bytes));
        pictures.pixels.resize(bytes);
        const ldm_status status = ldm_draw(handle_, prompts, count, &chosen, pictures.pixels.data(), &bytes);
        if (watched.thrown) std::rethrow_exception(watched.thrown);
        check(status);
        return pictures;
    }

    ldm_pipeline *handle_ = nullptr;
    std::shared_ptr<OnWarning> warning_;  // shared with clones, which may tell it too
};

// Standard normal noise, the values of torch.randn with that seed on the CPU.
inline std::vector<float> noise(std::int64_t seed, std::size_t count) {
    std::vector<float> values(count);
    check(ldm_noise(seed, values.data(), count));
    return values;
}

}  // namespace ldm
#endif
