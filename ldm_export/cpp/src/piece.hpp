// A piece of a prompt on its way through normalizers and pre-tokenizers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

namespace ldm::runtime {

struct Piece {
    std::u32string text;
    std::size_t leading;  // so many characters at the front stand for the prompt's first one

    Piece part(std::size_t start, std::size_t stop) const {
        return {text.substr(start, stop - start), std::min(std::max(leading, start), stop) - start};
    }
};

// Calls `match` with the place of each occurrence of a pattern, from left to right, and `between` with what is between two.
template <class Match, class Between>
void search(const std::u32string &text, const std::u32string &pattern, const Match &match, const Between &between) {
    std::size_t done = 0;
    for (std::size_t at; (at = text.find(pattern, done)) != std::u32string::npos; done = at + pattern.size()) {
        if (done < at) between(done, at);
        match(at, at + pattern.size());
    }
    if (done < text.size()) between(done, text.size());
}

}  // namespace ldm::runtime
