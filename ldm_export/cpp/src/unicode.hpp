// UTF-8, character classes, lower case, normal form C and grapheme clusters, as the Python package `tokenizers` has them,
// and what Python itself does to strings.
#pragma once

#include <string>
#include <string_view>

namespace ldm::runtime {

bool is_utf8(std::string_view text);

std::u32string decoded(std::string_view text);  // what is not UTF-8 becomes U+FFFD, byte by byte
std::string encoded(std::u32string_view text);

bool is_letter(char32_t c);
bool is_number(char32_t c);
bool is_space(char32_t c);
bool is_word_character(char32_t c);

std::u32string lower(std::u32string_view text);  // each code point by itself
std::u32string nfc(std::u32string_view text);    // Unicode Standard Annex 15

// `str.strip` and `str.lower`, which know another version of Unicode than `tokenizers`, other white space, and that a sigma
// is written otherwise where a word ends.
std::u32string_view python_strip(std::u32string_view text);
std::u32string python_lower(std::u32string_view text);

// How many characters the first extended grapheme cluster of a text has (Unicode Standard Annex 29); of regional indicators
// each is one, since clusters of six bytes and more are not looked at whole.
std::size_t cluster_length(std::u32string_view text);

}  // namespace ldm::runtime
