#include "picture.h"

#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static png_uint_32 format_of(uint32_t channels) { return channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB; }

int picture_write(const char *path, const uint8_t *pixels, uint32_t height, uint32_t width, uint32_t channels) {
    png_image image;
    memset(&image, 0, sizeof image);
    image.version = PNG_IMAGE_VERSION;
    image.height = height;
    image.width = width;
    image.format = format_of(channels);
    if (png_image_write_to_file(&image, path, 0, pixels, 0, NULL)) return 0;
    fprintf(stderr, "error: %s cannot be written (%s). Name another file.\n", path, image.message);
    return 1;
}

uint8_t *picture_read(const char *path, uint32_t channels, uint32_t *height, uint32_t *width) {
    const png_color white = {255, 255, 255};
    png_image image;
    uint8_t *pixels = NULL;
    memset(&image, 0, sizeof image);
    image.version = PNG_IMAGE_VERSION;
    if (png_image_begin_read_from_file(&image, path)) {
        image.format = format_of(channels);
        pixels = malloc(PNG_IMAGE_SIZE(image));
        if (pixels != NULL && png_image_finish_read(&image, &white, pixels, 0, NULL)) {
            *height = image.height;
            *width = image.width;
            return pixels;
        }
    }
    fprintf(stderr, "error: %s cannot be read as a PNG (%s). Give one.\n", path, image.message);
    png_image_free(&image);
    free(pixels);
    return NULL;
}
