// ldm.h with good and bad input, on the bundle that LDM_TEST_BUNDLE names.
#include <ldm/ldm.hpp>

#include <catch2/catch.hpp>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <thread>
#include <unistd.h>

namespace {

thread_local long allocations_left = -1;  // -1: as many as there are

const char *bundle() {
    const char *path = std::getenv("LDM_TEST_BUNDLE");
    return path == nullptr ? "" : path;
}

bool says(const char *part) { return std::strstr(ldm_last_error(), part) != nullptr; }

ldm_draw_options options() {
    ldm_draw_options options;
    REQUIRE(ldm_draw_options_init(&options, sizeof options) == LDM_OK);
    options.steps = 10;
    return options;
}

struct Opened {
    Opened() { REQUIRE(ldm_pipeline_open(bundle(), nullptr, &handle) == LDM_OK); }
    ~Opened() { ldm_pipeline_close(handle); }
    ldm_status draw(const ldm_draw_options &options) {
        size_t bytes = 0;
        const ldm_status status = ldm_draw(handle, &prompt, 1, &options, nullptr, &bytes);
        if (status != LDM_OK) return status;
        pixels.resize(bytes);
        return ldm_draw(handle, &prompt, 1, &options, pixels.data(), &bytes);
    }
    ldm_pipeline *handle = nullptr;
    const char *prompt = "a red circle";
    std::vector<std::uint8_t> pixels;
};

long resident_bytes() {
    long pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

// Failing allocations on demand: those of one thread, after so many.
void *operator new(std::size_t size) {
    if (allocations_left == 0) throw std::bad_alloc();
    if (allocations_left > 0) --allocations_left;
    if (void *memory = std::malloc(size == 0 ? 1 : size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

TEST_CASE("The version is the header's") {
    CHECK(std::string(ldm_version()) == std::to_string(LDM_VERSION_MAJOR) + "." + std::to_string(LDM_VERSION_MINOR) + "." +
                                            std::to_string(LDM_VERSION_PATCH));
}

TEST_CASE("Null pointers are refused") {
    ldm_pipeline *pipeline = nullptr;
    size_t count = 0;
    CHECK(ldm_pipeline_open(nullptr, nullptr, &pipeline) == LDM_ERROR_INPUT);
    CHECK(says("folder is NULL"));
    CHECK(ldm_pipeline_open("x", nullptr, nullptr) == LDM_ERROR_INPUT);
    CHECK(ldm_open_options_init(nullptr, 8) == LDM_ERROR_INPUT);
    CHECK(ldm_draw_options_init(nullptr, 8) == LDM_ERROR_INPUT);
    CHECK(ldm_pipeline_clone(nullptr, &pipeline) == LDM_ERROR_INPUT);
    CHECK(ldm_pipeline_info(nullptr, nullptr) == LDM_ERROR_INPUT);
    CHECK(ldm_draw(nullptr, nullptr, 1, nullptr, nullptr, &count) == LDM_ERROR_INPUT);
    CHECK(ldm_step_preview(nullptr, nullptr, &count) == LDM_ERROR_INPUT);
    CHECK(ldm_tokenize(nullptr, "a", nullptr, &count) == LDM_ERROR_INPUT);
    CHECK(ldm_noise(0, nullptr, 1) == LDM_ERROR_INPUT);
    CHECK(ldm_noise(0, nullptr, 0) == LDM_OK);
    CHECK(std::string(ldm_last_error()).empty());
    ldm_pipeline_close(nullptr);
}

TEST_CASE("A folder that is no bundle is refused") {
    ldm_pipeline *pipeline = reinterpret_cast<ldm_pipeline *>(&pipeline);
    CHECK(ldm_pipeline_open("/nowhere", nullptr, &pipeline) == LDM_ERROR_BUNDLE);
    CHECK(pipeline == nullptr);
    CHECK(says("there is no such folder"));
}

TEST_CASE("Structures of other sizes are taken as far as they go, and nonsense is refused", "[bundle]") {
    Opened opened;
    ldm_draw_options chosen = options();
    for (const size_t size : {size_t{0}, size_t{7}, size_t{1} << 40}) {
        chosen.struct_size = size;
        CHECK(opened.draw(chosen) == LDM_ERROR_INPUT);
        CHECK(says("struct_size"));
    }
    chosen.struct_size = offsetof(ldm_draw_options, steps);  // an older caller: it knows no `steps`
    chosen.steps = 77;
    CHECK(opened.draw(chosen) == LDM_OK);
    ldm_info info;
    info.struct_size = offsetof(ldm_info, width);
    info.width = 12345;
    CHECK(ldm_pipeline_info(opened.handle, &info) == LDM_OK);
    CHECK(info.height == 16);
    CHECK(info.width == 12345);
    ldm_open_options unknown;
    REQUIRE(ldm_open_options_init(&unknown, sizeof unknown) == LDM_OK);
    unknown.backend = "magic";
    ldm_pipeline *none = nullptr;
    CHECK(ldm_pipeline_open(bundle(), &unknown, &none) == LDM_ERROR_INPUT);
    CHECK(says("no backend 'magic'"));
}

TEST_CASE("What cannot be drawn is refused with a sentence", "[bundle]") {
    Opened opened;
    const auto refused = [&](auto change, const char *part) {
        ldm_draw_options chosen = options();
        change(chosen);
        CHECK(opened.draw(chosen) == LDM_ERROR_INPUT);
        CHECK(says(part));
    };
    static const std::int64_t label = 0;
    static const std::uint8_t image[16 * 16 * 3] = {};
    static const char *bad_text[] = {"\xff", "x"};
    refused([](auto &o) { o.sampler = "magic"; }, "no plan for 'magic'");
    refused([](auto &o) { o.sampler = "../ddim"; }, "no plan");
    refused([](auto &o) { o.sampler = "\xff"; }, "UTF-8");
    refused([](auto &o) { o.steps = 3; }, "ldm-export plan");
    refused([](auto &o) { o.guidance = -1; }, "guidance is -1");
    refused([](auto &o) { o.guidance = std::numeric_limits<double>::infinity(); }, "guidance");
    refused([](auto &o) { o.height = 17; }, "multiples of 2");
    refused([](auto &o) { o.width = 0xFFFFFFFE; }, "does not fit");
    refused([](auto &o) { o.class_labels = &label; }, "takes a prompt a picture");
    refused([](auto &o) { o.deepcache = 0; }, "deepcache is 0");
    refused([](auto &o) { o.whole = 1, o.sampler = "euler"; }, "has no loop euler-10");
    refused([](auto &o) { o.whole = 1, o.deepcache = 2; }, "Leave one of them out");
    refused([](auto &o) { o.negative_prompts = bad_text, o.negative_prompt_count = 1; }, "not UTF-8");
    refused([](auto &o) { o.negative_prompts = bad_text, o.negative_prompt_count = 2; }, "2 negative prompts");
    refused([](auto &o) { o.negative_prompts = bad_text, o.negative_prompt_count = 0; }, "0 negative prompts");
    refused([](auto &o) { o.image = image, o.strength = 0; }, "strength 0");
    refused([](auto &o) { o.image = image, o.image_count = 0; }, "0 images");
    opened.prompt = "\xC3(";
    refused([](auto &) {}, "not UTF-8");
    opened.prompt = nullptr;
    refused([](auto &) {}, "Prompt 0 is NULL");
    size_t bytes = 0;
    CHECK(ldm_draw(opened.handle, nullptr, 1, nullptr, nullptr, &bytes) == LDM_ERROR_INPUT);
    CHECK(ldm_draw(opened.handle, &opened.prompt, 0, nullptr, nullptr, &bytes) == LDM_ERROR_INPUT);
    CHECK(ldm_draw(opened.handle, &opened.prompt, SIZE_MAX, nullptr, nullptr, &bytes) == LDM_ERROR_INPUT);
}

TEST_CASE("Too small a buffer gets the size and nothing else", "[bundle]") {
    Opened opened;
    std::uint8_t pixels[4] = {1, 2, 3, 4};
    size_t bytes = sizeof pixels;
    CHECK(ldm_draw(opened.handle, &opened.prompt, 1, nullptr, pixels, &bytes) == LDM_ERROR_BUFFER);
    CHECK(bytes == 16 * 16 * 3);
    CHECK(pixels[0] == 1);
    std::int64_t id = 0;
    size_t count = 1;
    CHECK(ldm_tokenize(opened.handle, "a", &id, &count) == LDM_ERROR_BUFFER);
    CHECK(count == 16);
    CHECK(says("16 are needed"));
}

TEST_CASE("A callback cancels or throws at any step, and the next picture is the same", "[bundle]") {
    ldm::Pipeline pipeline(bundle());
    ldm::DrawOptions chosen;
    chosen.steps = 10;
    const std::vector<std::uint8_t> expected = pipeline.draw({"a red circle"}, chosen).pixels;
    for (std::size_t stop = 0; stop < 10; ++stop) {
        CHECK_THROWS_AS(pipeline.draw({"a red circle"}, chosen, [&](const ldm::Step &step) { return step.index() < stop; }),
                        ldm::Cancelled);
        CHECK_THROWS_WITH(pipeline.draw({"a red circle"}, chosen,
                                        [&](const ldm::Step &step) -> bool {
                                            if (step.index() == stop) throw std::runtime_error("enough");
                                            return true;
                                        }),
                          "enough");
    }
    ldm_draw_options c_options = options();
    c_options.step = [](const ldm_step *, void *) -> int { throw 42; };
    Opened opened;
    CHECK(opened.draw(c_options) == LDM_ERROR_CALLBACK);
    CHECK(says("threw an exception"));
    CHECK(pipeline.draw({"a red circle"}, chosen).pixels == expected);
}

TEST_CASE("A step shows its latents and a preview, the last one the picture", "[bundle]") {
    ldm::Pipeline pipeline(bundle());
    std::vector<std::uint8_t> preview;
    const ldm::Pictures pictures = pipeline.draw({"a", "b"}, {}, [&](const ldm::Step &step) {
        CHECK(step.latents_shape()[0] == 2);
        CHECK(std::isfinite(step.latents()[0]));
        if (step.index() + 1 == step.count()) preview = step.preview();
        return true;
    });
    CHECK(preview == pictures.pixels);
    CHECK(pictures.count == 2);
}

TEST_CASE("A pipeline that was closed or is in use is refused", "[bundle]") {
    Opened opened;
    ldm_pipeline *closed = nullptr;
    REQUIRE(ldm_pipeline_clone(opened.handle, &closed) == LDM_OK);
    ldm_pipeline_close(closed);
    ldm_pipeline_close(closed);
    size_t bytes = 0;
    CHECK(ldm_draw(closed, &opened.prompt, 1, nullptr, nullptr, &bytes) == LDM_ERROR_INPUT);
    CHECK(says("was closed"));
    ldm_draw_options chosen = options();
    chosen.step_user = opened.handle;
    chosen.step = [](const ldm_step *step, void *user) -> int {
        ldm_info info;
        info.struct_size = sizeof info;
        CHECK(ldm_pipeline_info(static_cast<ldm_pipeline *>(user), &info) == LDM_ERROR_INPUT);
        CHECK(says(step->index <= 1 ? "in use" : "was closed"));
        if (step->index == 1) ldm_pipeline_close(static_cast<ldm_pipeline *>(user));  // it goes once the drawing is over
        return 0;
    };
    CHECK(opened.draw(chosen) == LDM_OK);
    CHECK(opened.draw(chosen) == LDM_ERROR_INPUT);
}

TEST_CASE("Running out of memory is a status", "[bundle]") {
    Opened opened;
    size_t count = 0;
    std::int64_t ids[16];
    // the files are read before: the JSON parser's destructors allocate, and so cannot run without memory
    ldm_status status = ldm_tokenize(opened.handle, "", ids, &(count = 16));
    REQUIRE(status == LDM_OK);
    status = LDM_ERROR_MEMORY;
    long allowed = 0;
    for (; status != LDM_OK; ++allowed) {
        count = 16;
        allocations_left = allowed;
        status = ldm_tokenize(opened.handle, "a red circle, don't", ids, &count);
        allocations_left = -1;
        if (status != LDM_OK) {
            REQUIRE(status == LDM_ERROR_MEMORY);
            REQUIRE(says("Out of memory"));
        }
    }
    CHECK(allowed > 5);
    ldm_draw_options huge = options();
    huge.height = huge.width = 1 << 20;
    const char *prompts[1000];
    std::fill(std::begin(prompts), std::end(prompts), "a");
    count = 0;
    CHECK(ldm_draw(opened.handle, prompts, 1000, &huge, nullptr, &count) == LDM_OK);
    huge.height = huge.width = 1 << 20;
    count = SIZE_MAX;
    std::uint8_t pixel;
    CHECK(ldm_draw(opened.handle, prompts, 1000, &huge, &pixel, &count) == LDM_ERROR_MEMORY);
}

TEST_CASE("Four threads with clones draw what one draws", "[bundle][threads]") {
    ldm::Pipeline pipeline(bundle());
    ldm::DrawOptions chosen;
    chosen.steps = 10;
    std::vector<std::vector<std::uint8_t>> expected, drawn(4);
    for (std::int64_t seed = 0; seed < 4; ++seed) {
        chosen.seed = seed;
        expected.push_back(pipeline.draw({"a red circle"}, chosen).pixels);
    }
    std::vector<ldm::Pipeline> clones;
    for (int k = 0; k < 4; ++k) clones.push_back(k % 2 ? pipeline.clone() : ldm::Pipeline(bundle()).clone());
    std::vector<std::thread> threads;
    for (std::size_t k = 0; k < 4; ++k)
        threads.emplace_back([&, k] {
            ldm::DrawOptions own;
            own.steps = 10;
            own.seed = static_cast<std::int64_t>(k);
            drawn[k] = clones[k].draw({"a red circle"}, own).pixels;
        });
    for (std::thread &thread : threads) thread.join();
    CHECK(drawn == expected);
}

TEST_CASE("Opening, drawing, cancelling and closing grows nothing", "[.][bundle][life]") {
    const char *rounds = std::getenv("LDM_TEST_ROUNDS");
    const int count = rounds == nullptr ? 1000 : std::atoi(rounds);
    const auto round = [] {
        Opened opened;
        ldm_draw_options chosen = options();
        chosen.step = [](const ldm_step *step, void *) -> int { return step->index == 1; };
        REQUIRE(opened.draw(chosen) == LDM_ERROR_CANCELLED);
    };
    for (int i = 0; i < count / 10; ++i) round();
    const long before = resident_bytes();
    for (int i = 0; i < count; ++i) round();
    const long grown = resident_bytes() - before;
    INFO("grown by " << grown << " bytes in " << count << " rounds");
    CHECK(grown < count * 512L + (2 << 20));
    std::printf("grown by %ld bytes in %d rounds\n", grown, count);
}
