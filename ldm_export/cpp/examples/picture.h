/* PNG in and out, by libpng. */
#ifndef LDM_EXAMPLES_PICTURE_H
#define LDM_EXAMPLES_PICTURE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Write (height, width, channels), 3 channels or 1; gives 0, or 1 with a sentence on stderr. */
int picture_write(const char *path, const uint8_t *pixels, uint32_t height, uint32_t width, uint32_t channels);

/* Read a file as (height, width, channels), transparency on white; gives NULL with a sentence on stderr, else free it. */
uint8_t *picture_read(const char *path, uint32_t channels, uint32_t *height, uint32_t *width);

#ifdef __cplusplus
}
#endif
#endif
