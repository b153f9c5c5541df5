// Running out of memory: operator new is this file's own, and fails on demand.
#include "opened.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <limits>
#include <new>

#include <dlfcn.h>
#include <execinfo.h>

namespace {

// Of this thread: how many allocations succeed before some fail, -1 being all of them, and how many then do.
thread_local long allocations_left = -1, failures_left = 0;
thread_local long allocations = 0;
std::atomic<long> held{0};  // allocated and not yet released, by all threads

struct Failing {
    Failing(long after, long failures) { allocations_left = after, failures_left = failures, allocations = 0; }
    ~Failing() { allocations_left = -1; }
};
constexpr long ALL = std::numeric_limits<long>::max();

// Whether ONNX Runtime asked for the memory, itself or through the standard library; when it runs out of it, it releases
// some twice.
bool in_onnxruntime(void *caller) {
    const auto within = [](void *code) {
        Dl_info info;
        return ::dladdr(code, &info) != 0 && std::strstr(info.dli_fname, "libonnxruntime") != nullptr;
    };
    if (within(caller)) return true;
    void *frames[64];
    const int depth = ::backtrace(frames, 64);
    return std::any_of(frames, frames + depth, within);
}

}  // namespace

void *operator new(std::size_t size) {
    ++allocations;
    if (allocations_left > 0)
        --allocations_left;
    else if (allocations_left == 0 && failures_left > 0 && !in_onnxruntime(__builtin_return_address(0)))
        throw (--failures_left, std::bad_alloc());
    void *memory = std::malloc(size == 0 ? 1 : size);
    if (memory == nullptr) throw std::bad_alloc();
    ++held;
    return memory;
}
void operator delete(void *memory) noexcept {
    if (memory != nullptr) --held;
    std::free(memory);
}
void operator delete(void *memory, std::size_t) noexcept { operator delete(memory); }

namespace {

// From opening to closing; without `pixels` nothing that ONNX Runtime does.
ldm_status live(std::uint8_t *pixels, bool &told) {
    ldm_pipeline *pipeline = nullptr, *clone = nullptr;
    const char *prompt = "a red circle, don't";
    std::int64_t ids[16];
    size_t count = 16, bytes = 16 * 16 * 3;
    ldm_info info;
    info.struct_size = sizeof info;
    ldm_draw_options chosen;
    ldm_status status = ldm_draw_options_init(&chosen, sizeof chosen);
    chosen.steps = 10;
    static const std::vector<std::uint8_t> image(16 * 16 * 3, 100), mask(16 * 16, 200);
    chosen.image = image.data();
    chosen.mask = mask.data();
    chosen.keep_pixels = 1;
    if (status == LDM_OK) status = ldm_pipeline_open(bundle(), nullptr, &pipeline);
    if (status == LDM_OK) status = ldm_pipeline_clone(pipeline, &clone);
    if (status == LDM_OK) status = ldm_pipeline_info(clone, &info);
    if (status == LDM_OK) status = ldm_tokenize(clone, prompt, ids, &count);
    if (status == LDM_OK) status = ldm_draw(clone, &prompt, 1, &chosen, pixels, &bytes);
    told = ldm_last_error()[0] != '\0';
    ldm_pipeline_close(clone);
    ldm_pipeline_close(pipeline);
    return status;
}

void check_lives(long rounds, std::uint8_t *pixels) {
    bool told = false;
    REQUIRE(live(pixels, told) == LDM_OK);
    long total = 0, before = 0;
    {
        const Failing none(ALL, 0);
        REQUIRE(live(pixels, told) == LDM_OK);
        total = allocations;
    }
    int seen[LDM_ERROR_INTERNAL + 1] = {}, untold = 0;
    for (const long failures : {1L, ALL})
        for (long round = 0; round < rounds; ++round) {
            if (round == 1 && failures == 1) before = held;  // what is made once is made
            const Failing some(total * (rounds - 1 - round) / rounds, failures);
            const ldm_status status = live(pixels, told);
            ++seen[status];
            untold += told != (status != LDM_OK);
        }
    const long kept = held - before;
    std::printf("%ld allocations, %ld of which failed in turn; %ld kept;", total, rounds, kept);
    for (int status = 0; status <= LDM_ERROR_INTERNAL; ++status)
        if (seen[status] != 0) std::printf(" status %d %d times", status, seen[status]);
    std::printf("\n");
    CHECK(untold == 0);
    if (pixels == nullptr) CHECK(kept < 10);  // such as the last sentence; of ONNX Runtime AddressSanitizer sees what is lost
    CHECK(seen[LDM_ERROR_MEMORY] > 0);
    CHECK(seen[LDM_ERROR_INTERNAL] == 0);
}

}  // namespace

TEST_CASE("Any allocation may fail, once or from then on: it is a status, and nothing is kept", "[bundle]") {
    const char *wanted = std::getenv("LDM_TEST_ROUNDS");
    const long rounds = wanted == nullptr ? 100 : std::atol(wanted);
    check_lives(rounds, nullptr);
    std::uint8_t pixels[16 * 16 * 3];
    check_lives(rounds / 10, pixels);
}

TEST_CASE("More than the memory holds is refused before anything is allocated", "[bundle]") {
    Opened opened;
    ldm_draw_options huge = options();
    huge.height = huge.width = 1 << 20;
    const char *prompts[1000];
    std::fill(std::begin(prompts), std::end(prompts), "a");
    size_t count = 0;
    CHECK(ldm_draw(opened.handle, prompts, 1000, &huge, nullptr, &count) == LDM_ERROR_INPUT);
    huge.height = huge.width = 1 << 20;
    count = SIZE_MAX;
    std::uint8_t pixel;
    CHECK(ldm_draw(opened.handle, prompts, 1000, &huge, &pixel, &count) == LDM_ERROR_INPUT);
}
