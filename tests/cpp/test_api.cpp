// ldm.h with good and bad input.
#include "opened.hpp"

#include <ldm/ldm.hpp>

#include <cmath>
#include <fstream>
#include <limits>
#include <thread>

#include <unistd.h>

namespace {

long resident_bytes() {
    long pages = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

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

TEST_CASE("Null pointers are refused by an open pipeline too", "[bundle]") {
    Opened opened;
    CHECK(ldm_pipeline_clone(opened.handle, nullptr) == LDM_ERROR_INPUT);
    CHECK(ldm_pipeline_info(opened.handle, nullptr) == LDM_ERROR_INPUT);
    CHECK(ldm_draw(opened.handle, &opened.prompt, 1, nullptr, nullptr, nullptr) == LDM_ERROR_INPUT);
    CHECK(says("bytes is NULL"));
    CHECK(ldm_tokenize(opened.handle, "a", nullptr, nullptr) == LDM_ERROR_INPUT);
    size_t count = 0;
    CHECK(ldm_tokenize(opened.handle, nullptr, nullptr, &count) == LDM_ERROR_INPUT);
    CHECK(says("prompt is NULL"));
    ldm_step step{};
    CHECK(ldm_step_preview(&step, nullptr, &count) == LDM_ERROR_INPUT);
    CHECK(says("step->preview is NULL"));
}

TEST_CASE("The caller's arithmetic stays as it is", "[bundle]") {
    Opened opened;
    REQUIRE(opened.draw(options()) == LDM_OK);
    const volatile float subnormal = 1e-40f, one = 1.0f;
    CHECK(subnormal * one != 0.0f);
}

TEST_CASE("What is told of the backend stays where it was told", "[bundle]") {
    Opened opened;
    ldm_info info[2];
    for (ldm_info &each : info) {
        each.struct_size = sizeof each;
        REQUIRE(ldm_pipeline_info(opened.handle, &each) == LDM_OK);
    }
    CHECK(std::string(info[0].backend).find("onnxruntime") == 0);
    CHECK(info[0].backend == info[1].backend);
}

TEST_CASE("Sentences are UTF-8, whatever they quote") {
    ldm_pipeline *pipeline = nullptr;
    CHECK(ldm_pipeline_open("/nowhere/\xff", nullptr, &pipeline) == LDM_ERROR_BUNDLE);
    CHECK(says("/nowhere/\uFFFD: there is no such folder"));
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
    for (const size_t size : {size_t{0}, size_t{7}, sizeof chosen - 4, sizeof chosen + 1, size_t{1} << 40}) {
        chosen.struct_size = size;
        CHECK(opened.draw(chosen) == LDM_ERROR_INPUT);
        CHECK(says("struct_size"));
    }
    chosen.struct_size = offsetof(ldm_draw_options, steps);  // an older caller: it knows no `steps`
    chosen.steps = 77;
    CHECK(opened.draw(chosen) == LDM_OK);
    struct {
        ldm_draw_options known = options();
        const char *unknown = "of a newer caller";
    } newer;
    newer.known.struct_size = sizeof newer;
    CHECK(opened.draw(newer.known) == LDM_OK);
    ldm_info info;
    info.struct_size = offsetof(ldm_info, channels);
    info.channels = 12345;
    CHECK(ldm_pipeline_info(opened.handle, &info) == LDM_OK);
    CHECK(info.height == 16);
    CHECK(info.channels == 12345);
    ldm_open_options unknown;
    REQUIRE(ldm_open_options_init(&unknown, sizeof unknown) == LDM_OK);
    unknown.backend = "magic";
    ldm_pipeline *none = nullptr;
    CHECK(ldm_pipeline_open(bundle(), &unknown, &none) == LDM_ERROR_INPUT);
    CHECK(says("no backend 'magic'"));
    for (const std::int32_t threads : {-1, 1025}) {
        REQUIRE(ldm_open_options_init(&unknown, sizeof unknown) == LDM_OK);
        unknown.threads = threads;
        CHECK(ldm_pipeline_open(bundle(), &unknown, &none) == LDM_ERROR_INPUT);
        CHECK(says("threads is"));
    }
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
    refused([](auto &o) { o.steps = 1001; }, "it must be 1 to 1000, the number of timesteps");
    refused([](auto &o) { o.calls = 11; }, "calls is 11; the plan makes 10, of which 1 to 10 can be kept");
    refused([](auto &o) { o.calls = (1 << 20) + 1; }, "calls is 1048577; give a whole number from 1 to 1048576");
    refused([](auto &o) { o.guidance = -1; }, "guidance is -1");
    refused([](auto &o) { o.guidance = 1e308; }, "a number from 0 to 1000000");
    refused([](auto &o) { o.height = o.width = 1 << 19; }, "GB of memory");
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
    refused([](auto &o) { o.mask = image; }, "A mask was given without an image");
    refused([](auto &o) { o.image = image, o.keep_pixels = 1; }, "keep_pixels was given without a mask");
    refused([](auto &o) { o.image = image, o.mask = image, o.mask_count = 2; }, "2 masks were given for 1 pictures");
    refused([](auto &o) { o.image = image, o.mask = image; }, "Mask 0 is black everywhere");
    refused([](auto &o) { o.image_guidance = 1.5; }, "this model edits no picture");
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

TEST_CASE("A warning's callback may throw, and is told of what is cut off", "[bundle]") {
    std::string told;
    bool throws = false;
    ldm::OpenOptions asked;
    asked.warning = [&](const char *sentence) {
        if (throws) throw std::runtime_error("enough");
        told = sentence;
    };
    ldm::Pipeline pipeline(bundle(), asked);
    const std::string prompt(1000, 'x');
    CHECK(pipeline.tokenize(prompt + "\u00e9").size() == 16);
    CHECK(told.find("Cut off") != std::string::npos);
    throws = true;
    CHECK_THROWS_WITH(pipeline.draw({prompt}), Catch::Contains("The warning callback threw an exception: enough"));
    try {
        pipeline.clone().tokenize(prompt);
    } catch (const ldm::Error &error) {
        CHECK(error.status() == LDM_ERROR_CALLBACK);
    }
    throws = false;
    CHECK(pipeline.draw({prompt}).count == 1);
}

TEST_CASE("Any interval of deepcache serves", "[bundle]") {
    Opened opened;
    ldm_draw_options chosen = options();
    std::vector<std::uint8_t> drawn;
    for (const std::uint32_t interval : {UINT32_MAX, 10u}) {
        chosen.deepcache = interval;
        REQUIRE(opened.draw(chosen) == LDM_OK);
        if (!drawn.empty()) CHECK(opened.pixels == drawn);
        drawn = opened.pixels;
    }
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

TEST_CASE("Four threads with clones draw what one draws", "[bundle][threads]") {
    ldm::Pipeline pipeline(bundle());
    ldm::DrawOptions chosen;
    chosen.steps = 10;
    std::vector<std::vector<std::uint8_t>> expected, drawn(4);
    for (std::int64_t seed = 0; seed < 4; ++seed) {
        chosen.seed = seed;
        expected.push_back(pipeline.draw({"a red circle"}, chosen).pixels);
    }
    const ldm::Pipeline fresh(bundle());  // of which the clones load the graphs, and encode the prompt, at once
    std::vector<ldm::Pipeline> clones;
    for (int k = 0; k < 4; ++k) clones.push_back(fresh.clone());
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
    long early = 0;
    for (int i = 1; i <= count; ++i) {
        round();
        if (i == count / 10) early = resident_bytes();
    }
    const long late = resident_bytes();
    std::printf("%ld bytes resident after %d rounds, %ld after %d\n", early, count / 10, late, count);
    if (count >= 50) CHECK(late - early < count * 512L + (2 << 20));  // fewer do not settle
}
