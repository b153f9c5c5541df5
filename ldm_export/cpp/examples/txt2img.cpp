// Pictures of prompts, with the options of `ldm-export generate`: txt2img BUNDLE PROMPT... -o OUT.png
#include "outpaint.hpp"
#include "picture.h"

#include <ldm/ldm.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr const char *USAGE =
    "usage: txt2img BUNDLE PROMPT... -o OUT.png [--sampler S] [--steps N] [--calls N] [--guidance W] [--negative TEXT]\n"
    "               [--seed N] [--image IN.png] [--strength X] [--mask MASK.png] [--keep-pixels] [--outpaint SIDE=N,...]\n"
    "               [--image-guidance W] [--size HxW] [--class-label N]... [--count N]\n"
    "               [--deepcache N] [--backend auto|cpu|cuda|tensorrt-rtx|tensorrt]\n"
    "               [--threads N] [--latents OUT.npy] [--lora FILE[=STRENGTH]]...\n"
    "               [--prompt-weights] [--long-prompts]\n";

struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Arguments {
    std::vector<std::string> positional;                      // the bundle, then prompts
    std::map<std::string, std::vector<std::string>> options;  // values by name, in order

    std::string text(const std::string &name, const std::string &otherwise = "") const {
        const auto found = options.find(name);
        return found == options.end() ? otherwise : found->second.back();
    }
};

Arguments parsed(int argc, char **argv) {
    static const char *known[] = {"-o",     "--sampler", "--steps",       "--guidance", "--negative",  "--seed",    "--image",
                                  "--size", "--strength", "--class-label", "--count",    "--deepcache", "--backend", "--threads",
                                  "--latents", "--calls", "--mask", "--outpaint", "--image-guidance",
                                  "--lora"};
    static const char *flags[] = {"--keep-pixels", "--prompt-weights", "--long-prompts"};
    Arguments arguments;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (std::find(std::begin(flags), std::end(flags), word) != std::end(flags)) {
            arguments.options[word] = {"1"};
            continue;
        }
        if (word.empty() || word[0] != '-') {
            arguments.positional.push_back(word);
            continue;
        }
        if (std::find(std::begin(known), std::end(known), word) == std::end(known) || i + 1 == argc)
            throw UsageError(word + " is no option, or has no value.");
        arguments.options[word].emplace_back(argv[++i]);
    }
    if (arguments.positional.empty() || arguments.options.count("-o") == 0)
        throw UsageError("A bundle, and -o with the name of a PNG, are needed.");
    return arguments;
}

double number(const std::string &name, const std::string &text) {
    char *end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0') throw UsageError(name + " is '" + text + "'; a number is needed.");
    return value;
}

long long whole(const std::string &name, const std::string &text) {
    const double value = number(name, text);
    if (value != std::floor(value) || std::fabs(value) > 9e15) throw UsageError(name + " takes whole numbers.");
    return static_cast<long long>(value);
}

std::uint32_t positive(const std::string &name, const std::string &text) {
    const long long value = whole(name, text);
    if (value < 1 || value > INT32_MAX) throw UsageError(name + " is " + text + "; a whole number from 1 is needed.");
    return static_cast<std::uint32_t>(value);
}

// Several pictures in rows of about the square root of their number, on white.
int save_grid(const ldm::Pictures &pictures, const std::string &path) {
    const auto columns = static_cast<std::size_t>(std::ceil(std::sqrt(static_cast<double>(pictures.count))));
    const std::size_t rows = (pictures.count + columns - 1) / columns, line = pictures.width * pictures.channels;
    std::vector<std::uint8_t> sheet(rows * pictures.height * columns * line, 255);
    for (std::size_t k = 0; k < pictures.count; ++k)
        for (std::size_t y = 0; y < pictures.height; ++y)
            std::copy_n(pictures.pixels.data() + (k * pictures.height + y) * line, line,
                        sheet.data() + ((k / columns * pictures.height + y) * columns + k % columns) * line);
    return picture_write(path.c_str(), sheet.data(), static_cast<std::uint32_t>(rows * pictures.height),
                         static_cast<std::uint32_t>(columns * pictures.width), static_cast<std::uint32_t>(pictures.channels));
}

// numpy's file format, version 1.0: float32 (B, C, h, w).
void save_latents(const std::vector<float> &latents, const std::vector<std::size_t> &shape, const std::string &path) {
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    for (const std::size_t size : shape) header += std::to_string(size) + ", ";
    header += "), }";
    header.resize((10 + header.size() + 64) / 64 * 64 - 10, ' ');
    header.back() = '\n';
    std::ofstream file(path, std::ios::binary);
    file << "\x93NUMPY" << '\x01' << '\0' << static_cast<char>(header.size() & 0xff) << static_cast<char>(header.size() >> 8);
    file << header;
    file.write(reinterpret_cast<const char *>(latents.data()), static_cast<std::streamsize>(4 * latents.size()));
    if (!file.flush()) throw UsageError(path + " cannot be written. Name another file.");
}

// What is started from and what of it is drawn anew, with the room of --outpaint, read into memory that `draw` points to.
struct Pictures {
    std::vector<std::uint8_t> image, mask;

    // Read the pictures that the options name. False if one cannot be read, which picture_read has printed.
    bool read(const Arguments &arguments, const ldm_info &model, ldm::DrawOptions &draw) {
        const bool masked = arguments.options.count("--mask") != 0, roomy = arguments.options.count("--outpaint") != 0;
        if (arguments.options.count("--image") == 0) {
            if (masked || roomy) throw UsageError("--mask and --outpaint are of an --image. Name the picture.");
            return true;
        }
        std::uint32_t height = 0, width = 0;
        if (!load(arguments.text("--image"), model.channels, image, draw.height, draw.width)) return false;
        if (masked && !load(arguments.text("--mask"), 1, mask, height, width)) return false;
        if (masked && (height != draw.height || width != draw.width))
            throw UsageError("The mask is " + std::to_string(height) + "x" + std::to_string(width) + " and the image " +
                             std::to_string(draw.height) + "x" + std::to_string(draw.width) +
                             "; a mask has the size of its image. Resize the mask.");
        if (roomy) {
            const outpaint::Margins room = outpaint::margins_from_text(arguments.text("--outpaint"), model.pixels_per_latent);
            if (!masked) mask.assign(std::size_t{draw.height} * draw.width, 0);
            mask = outpaint::with_room(mask.data(), draw.height, draw.width, 1, room, 255);
            image = outpaint::with_room(image.data(), draw.height, draw.width, model.channels, room);
            draw.height += static_cast<std::uint32_t>(room.top + room.bottom);
            draw.width += static_cast<std::uint32_t>(room.left + room.right);
        }
        draw.image = image.data();
        draw.mask = mask.empty() ? nullptr : mask.data();
        return true;
    }

  private:
    static bool load(const std::string &path, std::uint32_t channels, std::vector<std::uint8_t> &pixels, std::uint32_t &height,
                     std::uint32_t &width) {
        const std::unique_ptr<std::uint8_t, decltype(&std::free)> found(picture_read(path.c_str(), channels, &height, &width),
                                                                        std::free);
        if (found == nullptr) return false;
        pixels.assign(found.get(), found.get() + std::size_t{height} * width * channels);
        return true;
    }
};

int run(const Arguments &arguments) {
    const std::vector<std::string> prompts(arguments.positional.begin() + 1, arguments.positional.end());
    ldm::OpenOptions open;
    open.backend = arguments.text("--backend", "auto");
    open.threads = static_cast<int>(arguments.options.count("--threads") ? positive("--threads", arguments.text("--threads")) : 0);
    open.warning = [](const char *sentence) { std::cerr << "warning: " << sentence << "\n"; };
    ldm::Pipeline pipeline(arguments.positional[0], open);

    ldm::DrawOptions draw;
    Pictures given;
    for (const auto &[name, values] : arguments.options) {
        const std::string &value = values.back();
        if (name == "--sampler") draw.sampler = value;
        if (name == "--steps") draw.steps = positive(name, value);
        if (name == "--calls") draw.calls = positive(name, value);
        if (name == "--guidance") draw.guidance = number(name, value);
        if (name == "--negative") draw.negative_prompts = {value};
        if (name == "--prompt-weights") draw.prompt_weights = true;
        if (name == "--long-prompts") draw.long_prompts = true;
        if (name == "--seed") draw.seed = whole(name, value);
        if (name == "--strength") draw.strength = number(name, value);
        if (name == "--image-guidance") draw.image_guidance = number(name, value);
        if (name == "--keep-pixels") draw.keep_pixels = true;
        if (name == "--deepcache") draw.deepcache = positive(name, value);
        if (name == "--class-label")
            for (const std::string &label : values) draw.class_labels.push_back(whole(name, label));
        if (name == "--lora")
            for (const std::string &adapter : values) {
                const std::size_t equals = adapter.rfind('=');
                const bool plain = equals == std::string::npos;
                draw.adapters.push_back({adapter.substr(0, equals), plain ? 1.0 : number(name, adapter.substr(equals + 1))});
            }
        if (name == "--size") {
            const std::size_t cross = value.find('x');
            if (cross == std::string::npos) throw UsageError("--size is HEIGHTxWIDTH in pixels, such as 64x64.");
            draw.height = positive(name, value.substr(0, cross));
            draw.width = positive(name, value.substr(cross + 1));
        }
    }
    if (!given.read(arguments, pipeline.info(), draw)) return 2;
    std::vector<float> latents;
    std::vector<std::size_t> shape;
    const auto show = [&](const ldm::Step &step) {
        std::cerr << "\rdrawing " << step.index() + 1 << "/" << step.count() << std::flush;
        if (step.index() + 1 == step.count()) {
            shape.assign(std::begin(step.latents_shape()), std::end(step.latents_shape()));
            latents.assign(step.latents(), step.latents() + shape[0] * shape[1] * shape[2] * shape[3]);
        }
        return true;
    };
    const std::size_t count = draw.class_labels.empty() ? positive("--count", arguments.text("--count", "1")) : draw.class_labels.size();
    const ldm::Pictures pictures = prompts.empty() ? pipeline.draw(count, draw, show) : pipeline.draw(prompts, draw, show);
    std::cerr << "\n";
    if (save_grid(pictures, arguments.text("-o")) != 0) return 2;
    if (arguments.options.count("--latents")) save_latents(latents, shape, arguments.text("--latents"));
    std::cout << arguments.text("-o") << ": " << pictures.count << " of " << pictures.width << "x" << pictures.height << " on "
              << pipeline.info().backend << "\n";
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    try {
        return run(parsed(argc, argv));
    } catch (const UsageError &error) {
        std::cerr << "error: " << error.what() << "\n" << USAGE;
    } catch (const std::bad_alloc &) {
        std::cerr << "error: Out of memory. Close other programs, or ask for fewer or smaller pictures.\n";
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << "\n";
    }
    return 2;
}
