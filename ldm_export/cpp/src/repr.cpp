#include "repr.hpp"

#include "error.hpp"

#include <cmath>
#include <cstdio>
#include <iomanip>

namespace ldm::runtime {

namespace {

constexpr std::size_t LONGEST = 60;

std::string repr(const std::string &text) {
    const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
    std::string found(1, quote);
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        const auto next = static_cast<unsigned char>(i + 1 < text.size() ? text[i + 1] : 0);
        char code[8] = {text[i]};
        if (text[i] == quote || text[i] == '\\')
            std::snprintf(code, sizeof code, "\\%c", text[i]);
        else if (text[i] == '\n' || text[i] == '\r' || text[i] == '\t')
            std::snprintf(code, sizeof code, "\\%c", text[i] == '\n' ? 'n' : text[i] == '\r' ? 'r' : 't');
        else if (byte < 0x20 || byte == 0x7f)
            std::snprintf(code, sizeof code, "\\x%02x", static_cast<unsigned>(byte));
        else if (byte == 0xC2 && (next <= 0xA0 || next == 0xAD)) {  // U+0080 to U+00A0, and the soft hyphen
            std::snprintf(code, sizeof code, "\\x%02x", static_cast<unsigned>(next));
            ++i;
        }
        found += code;
    }
    return found + quote;
}

// The fewest digits that read back as the number.
std::string repr(double number) {
    if (std::isnan(number)) return "nan";
    if (std::isinf(number)) return number > 0 ? "inf" : "-inf";
    std::string shortest;
    for (int precision = 0; precision <= 16; ++precision) {
        std::ostringstream text;
        text.imbue(std::locale::classic());
        text << std::scientific << std::setprecision(precision) << number;
        shortest = text.str();
        std::istringstream back(shortest);
        back.imbue(std::locale::classic());
        double again = 0;
        if ((back >> again || std::abs(number) < 1e-300) && again == number) break;
    }
    const std::size_t e = shortest.find('e');
    const int exponent = std::stoi(shortest.substr(e + 1));
    if (exponent < -4 || exponent >= 16) return shortest;
    const auto digits = static_cast<int>(e - (shortest[0] == '-') - (shortest.find('.') != std::string::npos));
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << std::fixed << std::setprecision(std::max(digits - 1 - exponent, 1)) << number;
    return text.str();
}

std::string repr(const Json &value) {
    if (value.is(Kind::text)) return repr(value.text());
    if (value.is(Kind::boolean)) return value.boolean() ? "True" : "False";
    if (value.is(Kind::integer)) return std::to_string(value.integer());
    if (value.is(Kind::number)) return repr(value.number());
    std::string inside;
    if (value.is(Kind::array)) {
        for (const Json &item : value.array()) {
            inside += (inside.empty() ? "" : ", ") + repr(item);
            if (inside.size() > 4 * LONGEST) break;  // no more of it is shown
        }
        return "[" + inside + "]";
    }
    if (value.is(Kind::object)) {
        for (const auto &[key, item] : value.object()) {
            inside += (inside.empty() ? "" : ", ") + repr(key) + ": " + repr(item);
            if (inside.size() > 4 * LONGEST) break;
        }
        return "{" + inside + "}";
    }
    return "None";
}

}  // namespace

std::string short_repr(const Json &value) {
    const std::string text = repr(value);
    std::size_t characters = 0;
    for (std::size_t i = 0; i < text.size(); ++i)
        if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80 && characters++ == LONGEST) return text.substr(0, i) + "...";
    return text;
}

std::string brief(double number, int digits) {
    if (!std::isfinite(number)) return repr(number);
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << std::setprecision(digits) << number;
    return text.str();
}

}  // namespace ldm::runtime
