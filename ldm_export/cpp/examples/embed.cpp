// How an application with an event loop draws: a thread of its own, a queue back to the loop, progress, previews and a
// way to cancel. embed BUNDLE PROMPT OUT.png; type a line to cancel.
#include "picture.h"

#include <ldm/ldm.hpp>

#include <atomic>
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <variant>

#include <poll.h>
#include <unistd.h>

namespace {

struct Progress {
    std::size_t done, of;
};
struct Preview {
    std::vector<std::uint8_t> pixels;
};
struct Finished {
    ldm::Pictures pictures;
};
struct Failed {
    std::string sentence;
};
using Event = std::variant<Progress, Preview, Finished, Failed>;

// What the drawing thread tells the event loop. A toolkit's own "post to the main thread" takes its place.
class Mailbox {
  public:
    void post(Event event) {
        const std::lock_guard<std::mutex> lock(mutex_);
        events_.push(std::move(event));
    }
    bool take(Event &event) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (events_.empty()) return false;
        event = std::move(events_.front());
        events_.pop();
        return true;
    }

  private:
    std::mutex mutex_;
    std::queue<Event> events_;
};

// Draws one prompt in the background; destroying it cancels and waits.
class Drawing {
  public:
    Drawing(ldm::Pipeline pipeline, std::string prompt, Mailbox &mailbox)
        : thread_([this, pipeline = std::move(pipeline), prompt = std::move(prompt), &mailbox]() mutable {
              try {
                  mailbox.post(Finished{pipeline.draw({prompt}, {}, [&](const ldm::Step &step) {
                      mailbox.post(Progress{step.index() + 1, step.count()});
                      if (step.index() % 5 == 4) mailbox.post(Preview{step.preview()});
                      return !cancelled_;
                  })});
              } catch (const std::exception &error) {
                  mailbox.post(Failed{error.what()});
              }
          }) {}
    ~Drawing() {
        cancel();
        thread_.join();
    }
    void cancel() { cancelled_ = true; }

  private:
    std::atomic<bool> cancelled_{false};
    std::thread thread_;
};

bool key_was_pressed() {
    pollfd input{STDIN_FILENO, POLLIN, 0};
    char ignored;
    return ::poll(&input, 1, 20) > 0 && (input.revents & POLLIN) != 0 && ::read(STDIN_FILENO, &ignored, 1) == 1;
}

// What the application does with an event; the exit status once the drawing is over, -1 until then.
int handle(const Event &event, const char *output) {
    if (const auto *progress = std::get_if<Progress>(&event)) {
        std::cerr << "step " << progress->done << " of " << progress->of << "\n";
    } else if (const auto *preview = std::get_if<Preview>(&event)) {
        std::cerr << "preview of " << preview->pixels.size() << " bytes\n";
    } else if (const auto *failed = std::get_if<Failed>(&event)) {
        std::cerr << "error: " << failed->sentence << "\n";
        return 1;
    } else {
        const ldm::Pictures &pictures = std::get<Finished>(event).pictures;
        return picture_write(output, pictures.pixels.data(), static_cast<std::uint32_t>(pictures.height),
                             static_cast<std::uint32_t>(pictures.width), static_cast<std::uint32_t>(pictures.channels));
    }
    return -1;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) {
        std::cerr << "usage: embed BUNDLE PROMPT OUT.png\n";
        return 2;
    }
    try {
        const ldm::Pipeline pipeline(argv[1]);
        Mailbox mailbox;
        Drawing drawing(pipeline.clone(), argv[2], mailbox);
        for (;;) {  // the event loop
            if (key_was_pressed()) drawing.cancel();
            for (Event event; mailbox.take(event);)
                if (const int status = handle(event, argv[3]); status >= 0) return status;
        }
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}
