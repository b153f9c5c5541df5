/* ldm.h: pictures from a bundle of ldm_export, without Python and without PyTorch. C11.

    #include <ldm/ldm.h>
    #include <stdio.h>
    #include <stdlib.h>

    int main(void) {
        ldm_pipeline *pipeline = NULL;
        const char *prompts[] = {"red apple"};
        size_t bytes = 0;
        if (ldm_pipeline_open("emoji64.bundle", NULL, &pipeline) == LDM_OK &&
            ldm_draw(pipeline, prompts, 1, NULL, NULL, &bytes) == LDM_OK) {
            unsigned char *pixels = malloc(bytes);                  // (1, height, width, channels)
            if (pixels != NULL && ldm_draw(pipeline, prompts, 1, NULL, pixels, &bytes) == LDM_OK)
                fwrite(pixels, 1, bytes, stdout);
            free(pixels);
        }
        fputs(ldm_last_error(), stderr);
        ldm_pipeline_close(pipeline);
    }

Errors      Every function that can fail gives a status; ldm_last_error() has the sentence, of this thread's last call.
Memory      What is given to a function stays the caller's and is read only during the call. Buffers are the caller's:
            call with NULL to learn the size. Only ldm_pipeline_close releases something.
Threads     A pipeline may be used from one thread at a time; a second one is refused. ldm_pipeline_clone gives another
            that shares all weights; clones run at once.
Structures  The first member is the size of the structure as the caller knows it; the _init functions set it and the
            defaults. Members are only ever added at the end.
Text        UTF-8. */
#ifndef LDM_LDM_H
#define LDM_LDM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LDM_API
#else
#define LDM_API __attribute__((visibility("default")))
#endif

#define LDM_VERSION_MAJOR 0
#define LDM_VERSION_MINOR 1
#define LDM_VERSION_PATCH 0

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ldm_status {
    LDM_OK = 0,
    LDM_ERROR_INPUT = 1,     /* an argument that cannot be used: unknown sampler, odd size, text that is not UTF-8 */
    LDM_ERROR_BUNDLE = 2,    /* a bundle that cannot be trusted: missing, altered, reaching outside its folder */
    LDM_ERROR_BACKEND = 3,   /* what was asked for cannot run here */
    LDM_ERROR_CANCELLED = 4, /* the callback asked to stop */
    LDM_ERROR_BUFFER = 5,    /* the buffer is too small; the size that is needed has been written */
    LDM_ERROR_MEMORY = 6,    /* out of memory */
    LDM_ERROR_CALLBACK = 7,  /* the callback threw an exception, which must not cross C */
    LDM_ERROR_INTERNAL = 8   /* a defect of this library; please report the sentence */
} ldm_status;

typedef struct ldm_pipeline ldm_pipeline; /* an opened bundle */
typedef struct ldm_preview ldm_preview;   /* what ldm_step_preview decodes with; valid during the callback */

/* One finished network call. `latents` is the live buffer of (B, C, h, w) values; copy it to keep it. */
typedef struct ldm_step {
    size_t struct_size;
    uint32_t index; /* from 0 */
    uint32_t count; /* how many there are */
    double timestep;
    const float *latents;
    size_t latents_shape[4];
    const ldm_preview *preview;
} ldm_step;

/* Called after each step, on the thread that draws; anything but 0 cancels. */
typedef int (*ldm_step_callback)(const ldm_step *step, void *user);

/* Told what is not as asked for and no error: a target that is passed over, a prompt that is cut off. Clones tell it too,
   each on the thread that draws. */
typedef void (*ldm_warning_callback)(const char *sentence, void *user);

typedef struct ldm_open_options {
    size_t struct_size;
    const char *backend; /* "cpu", "cuda", "tensorrt-rtx" or "tensorrt", or "auto": engines that fit, where the library is
                            built with TensorRT, else CUDA where ONNX Runtime has it, else the CPU; "auto" */
    int32_t threads;     /* for one operator, to 1024; 0: one a physical core that this process may use */
    int32_t verify;      /* 1: check every file's SHA-256, of the bytes that are used, and open all graphs at once; 0 */
    ldm_warning_callback warning;
    void *warning_user;
} ldm_open_options;

typedef struct ldm_draw_options {
    size_t struct_size;
    const char *sampler;                 /* such as "euler"; NULL: the bundle's own */
    uint32_t steps;                      /* any that the sampler can do; 0: the bundle's own number */
    double guidance;                     /* from 0 to 1e6, 1 or less is off; NaN: the bundle's own */
    const char *const *negative_prompts; /* NULL: none, for which some models take zeros; "" is a text like any other */
    size_t negative_prompt_count;        /* one for all pictures, or one each */
    int64_t seed;                        /* picture k uses seed + k; 0 */
    const int64_t *seeds;                /* or one a picture; NULL */
    uint32_t height, width;              /* pixels, multiples of what a latent stands for; 0: the model's own */
    const uint8_t *image;                /* to start from or to edit: (H, W, C), height and width being its own; NULL */
    size_t image_count;                  /* one for all pictures, or one each; 1 */
    double strength;                     /* in (0, 1], the share of the steps that is redone on the image; NaN: 0.6, and with
                                            a mask 1, which starts from noise */
    const int64_t *class_labels;         /* one a picture, for class-conditional models; NULL */
    uint32_t deepcache;                  /* the whole denoiser in every so many steps only; 1 is off */
    int32_t whole;                       /* 1: by the plan's loop graph, all in one call; 0 */
    ldm_step_callback step;
    void *step_user;
    uint32_t calls;                      /* of the network, outputs of the other steps being forecast; 0: all */
    const char *const *adapters;         /* files that ldm-export lora has made for the bundle; NULL */
    const double *adapter_strengths;     /* of each, from -1000 to 1000; NULL: 1 */
    const int64_t *adapter_pictures;     /* the picture that each is for, from 0, or -1 for all; NULL: all */
    size_t adapter_count;
    const uint8_t *mask;                 /* (H, W) of the image: 255 is drawn anew, 0 is kept, a blend between; NULL */
    size_t mask_count;                   /* one for all pictures, or one each; 1 */
    int32_t keep_pixels;                 /* 1: pixels that the mask keeps are the image's to the bit; 0 */
    double image_guidance;               /* of a model that edits the image, towards it: from 0 to 1e6, below 1 both guidances
                                            are off; NaN: 1.5 */
    int32_t prompt_weights;              /* 1: "(word:1.2)", "(word)" and "[word]" in prompts are weights; 0 */
    int32_t long_prompts;                /* 1: prompts too long for the text encoder are read in chunks; 0: cut off */
} ldm_draw_options;

/* What a bundle draws; the texts live as long as the pipeline. */
typedef struct ldm_info {
    size_t struct_size;
    const char *backend; /* what really runs the graphs, such as "onnxruntime 1.32.0 cpu ort-cpu" */
    uint32_t height, width, channels; /* of a picture, by default */
    uint32_t latent_channels, pixels_per_latent;
    uint32_t reads_text;  /* 1: takes prompts */
    uint32_t class_count; /* 0: takes no class labels */
    uint32_t token_count; /* of a prompt, with start, end and padding; 0 for a model that reads no text */
    const char *default_sampler;
    uint32_t default_steps;
    double default_guidance;
} ldm_info;

/* The library's version, "major.minor.patch". */
LDM_API const char *ldm_version(void);

/* What went wrong in this thread's last call, "" if nothing did; valid until its next call. */
LDM_API const char *ldm_last_error(void);

/* Set the defaults; give sizeof the structure. */
LDM_API ldm_status ldm_open_options_init(ldm_open_options *options, size_t struct_size);
LDM_API ldm_status ldm_draw_options_init(ldm_draw_options *options, size_t struct_size);

/* Open a bundle, a folder. options: NULL for the defaults. */
LDM_API ldm_status ldm_pipeline_open(const char *folder, const ldm_open_options *options, ldm_pipeline **pipeline);

/* Another pipeline on the same weights, for another thread. */
LDM_API ldm_status ldm_pipeline_clone(ldm_pipeline *pipeline, ldm_pipeline **clone);

/* Release a pipeline; NULL and one that was released already are let pass. Weights go with the last clone. */
LDM_API void ldm_pipeline_close(ldm_pipeline *pipeline);

/* Tell what the bundle draws; info->struct_size must be set. */
LDM_API ldm_status ldm_pipeline_info(ldm_pipeline *pipeline, ldm_info *info);

/* Draw `count` pictures, one a prompt; prompts is NULL for a model that reads no text.

   pixels: uint8 (count, height, width, channels), of *bytes bytes; NULL only checks the request. *bytes becomes the size
   that is needed. */
LDM_API ldm_status ldm_draw(ldm_pipeline *pipeline, const char *const *prompts, size_t count,
                            const ldm_draw_options *options, uint8_t *pixels, size_t *bytes);

/* Inside the step callback: the latents as pictures, with a buffer as ldm_draw's. */
LDM_API ldm_status ldm_step_preview(const ldm_step *step, uint8_t *pixels, size_t *bytes);

/* The ids that the text encoder reads of a prompt; *count is their number, as *bytes above. */
LDM_API ldm_status ldm_tokenize(ldm_pipeline *pipeline, const char *prompt, int64_t *ids, size_t *count);

/* Standard normal noise, the values of torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed)). */
LDM_API ldm_status ldm_noise(int64_t seed, float *values, size_t count);

#ifdef __cplusplus
}
#endif
#endif
