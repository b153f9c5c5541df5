/* A picture of a prompt, in C: txt2img_c BUNDLE PROMPT OUT.png */
#include "picture.h"

#include <ldm/ldm.h>
#include <stdio.h>
#include <stdlib.h>

static int show(const ldm_step *step, void *user) {
    (void)user;
    fprintf(stderr, "\rstep %u of %u", step->index + 1, step->count);
    return 0; /* anything else cancels */
}

int main(int argc, char **argv) {
    ldm_pipeline *pipeline = NULL;
    ldm_draw_options options;
    ldm_info info;
    uint8_t *pixels = NULL;
    size_t bytes = 0;
    int result = 2;

    info.struct_size = sizeof info;
    if (argc != 4) {
        fprintf(stderr, "usage: %s BUNDLE PROMPT OUT.png\n", argv[0]);
        return 2;
    }
    const char *prompts[] = {argv[2]};
    ldm_draw_options_init(&options, sizeof options);
    options.step = show;
    if (ldm_pipeline_open(argv[1], NULL, &pipeline) == LDM_OK && ldm_pipeline_info(pipeline, &info) == LDM_OK &&
        ldm_draw(pipeline, prompts, 1, &options, NULL, &bytes) == LDM_OK && (pixels = malloc(bytes)) != NULL &&
        ldm_draw(pipeline, prompts, 1, &options, pixels, &bytes) == LDM_OK) {
        fprintf(stderr, "\n");
        result = picture_write(argv[3], pixels, info.height, info.width, info.channels) == 0 ? 0 : 2;
    } else {
        fprintf(stderr, "error: %s\n", ldm_last_error());
    }
    free(pixels);
    ldm_pipeline_close(pipeline);
    return result;
}
