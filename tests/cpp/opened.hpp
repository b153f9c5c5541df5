// What tests of ldm.h share: the bundle that LDM_TEST_BUNDLE names, opened.
#pragma once

#include <ldm/ldm.h>

#include <catch2/catch.hpp>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

inline const char *bundle() {
    const char *path = std::getenv("LDM_TEST_BUNDLE");
    return path == nullptr ? "" : path;
}

inline bool says(const char *part) { return std::strstr(ldm_last_error(), part) != nullptr; }

inline ldm_draw_options options() {
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
