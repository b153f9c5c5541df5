// Compiles plans for the tests: of each line {"config": …, "sampler": …, "steps": …, "tokens": …} prints the plan, or the refusal, as one
// line of JSON. The config is text, so that it is read as a bundle's file is.
#include "compiler.hpp"
#include "error.hpp"

#include <cstdio>
#include <iostream>

using namespace ldm::runtime;

namespace {

void print(double number) { std::printf("%.17g", number); }

template <class Items, class Print>
void print(const Items &items, Print each) {
    const char *mark = "[";
    for (const auto &item : items) {
        std::fputs(mark, stdout);
        each(item);
        mark = ",";
    }
    std::fputs(items.empty() ? "[]" : "]", stdout);
}

void print(const Row &row) {
    const double numbers[] = {row.timestep, row.input_scale, row.from_sample, row.from_output,
                              row.clip,     row.keep,        row.direct,      row.noise};
    std::fputs("[", stdout);
    for (const double number : numbers) {
        print(number);
        std::fputs(",", stdout);
    }
    print(row.weights, [](double weight) { print(weight); });
    std::fputs("]", stdout);
}

void print(const std::vector<Row> &rows) {
    print(rows, [](const Row &row) { print(row); });
}

void print(const Plan &plan) {
    std::vector<Entry> entries;  // of which some may be refused
    for (std::size_t step = 0; step < plan.num_inference_steps; ++step) entries.push_back(plan.entry(step));
    std::printf("{\"sampler\":\"%s\",\"steps\":%zu,\"init_scale\":%.17g,\"rows\":", plan.sampler.c_str(),
                plan.num_inference_steps, plan.init_scale);
    print(plan.rows);
    std::fputs(",\"entries\":", stdout);
    print(entries, [](const Entry &entry) {
        std::printf("[%.17g,%.17g,%zu,", entry.image_scale, entry.noise_scale, entry.resume);
        print(entry.warmup);
        std::fputs("]", stdout);
    });
    std::fputs("}\n", stdout);
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        const Json asked = parsed(line, Repeats::refused);
        try {
            const Json config = parsed(asked["config"].text(), Repeats::refused, Constants::allowed);
            print(compile_plan(config, asked["sampler"].text(), asked["steps"].integer(), asked["tokens"].integer()));
        } catch (const InputError &error) {
            std::printf("{\"refused\":%s}\n", Json(std::string(error.what())).dump().c_str());
        }
        std::fflush(stdout);
    }
}
