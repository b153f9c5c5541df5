// The C++ runtime as a peer that draws: peer BUNDLE. It takes the commands of ../peer.py, and answers as that does.
#include <ldm/ldm.hpp>

#include <chrono>
#include <ctime>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>
#include <unistd.h>

namespace {

constexpr std::uint32_t STEPS = 20;
constexpr double GUIDANCE = 4.0;
const char *const PROMPTS[] = {"red apple", "black cat", "rocket", "pizza", "octopus", "snowman", "frog face", "crescent moon"};

double since_process_start() {
    std::string line;
    std::getline(std::ifstream("/proc/self/stat"), line);
    std::istringstream fields(line.substr(line.rfind(')') + 2));
    std::string field;
    for (int i = 0; i < 20; ++i) fields >> field;
    timespec now{};
    clock_gettime(CLOCK_BOOTTIME, &now);
    const double ticks = std::stod(field) / static_cast<double>(sysconf(_SC_CLK_TCK));
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 - ticks;
}

long long bytes_of(const std::string &name) {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (word == name + ":") {
            long long kilobytes = 0;
            status >> kilobytes;
            return kilobytes * 1024;
        }
    return 0;
}

ldm::Pictures draw(ldm::Pipeline &pipeline, int k) {
    ldm::DrawOptions options;
    options.sampler = "ddim";
    options.steps = STEPS;
    options.guidance = GUIDANCE;
    options.seed = k;
    return pipeline.draw({PROMPTS[static_cast<std::size_t>(k) % std::size(PROMPTS)]}, options);
}

// numpy's file format, version 1.0, of levels from 0 to 1.
void save(const ldm::Pictures &pictures, const std::string &path) {
    std::ostringstream head;
    head << "{'descr': '<f4', 'fortran_order': False, 'shape': (" << pictures.count << ", " << pictures.height << ", "
         << pictures.width << ", " << pictures.channels << "), }";
    std::string header = head.str();
    header.resize((10 + header.size() + 64) / 64 * 64 - 10, ' ');
    header.back() = '\n';
    std::ofstream file(path, std::ios::binary);
    file << "\x93NUMPY" << '\x01' << '\0' << static_cast<char>(header.size() & 0xff) << static_cast<char>(header.size() >> 8);
    file << header;
    for (const std::uint8_t pixel : pictures.pixels) {
        const float level = static_cast<float>(pixel) / 255.0f;
        file.write(reinterpret_cast<const char *>(&level), sizeof level);
    }
}

}  // namespace

int main(int, char **argv) {
    try {
        std::optional<ldm::Pipeline> pipeline;
        for (std::string line; std::getline(std::cin, line);) {
            std::istringstream words(line);
            std::string command, path;
            int k = 0;
            words >> command >> k >> path;
            if (command == "open") {
                const double begun = since_process_start();
                ldm::OpenOptions options;
                options.backend = "cpu";
                pipeline.emplace(argv[1], options);
                std::cout << "{\"imported_s\": " << begun << ", \"load_s\": " << since_process_start() - begun << "}";
            } else if (command == "run") {
                const auto started = std::chrono::steady_clock::now();
                draw(pipeline.value(), k);
                const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - started;
                std::cout << "{\"ms\": " << taken.count() << ", \"since_start_s\": " << since_process_start() << "}";
            } else if (command == "save") {
                save(draw(pipeline.value(), k), path);
                std::cout << "{}";
            } else {
                std::cout << "{\"peak_bytes\": " << bytes_of("VmHWM") << ", \"held_bytes\": " << bytes_of("VmRSS") << "}";
            }
            std::cout << std::endl;
        }
    } catch (const std::exception &error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
