#include "normalizers.hpp"

#include "charsmap.hpp"
#include "error.hpp"
#include "repr.hpp"
#include "unicode.hpp"

#include <memory>

namespace ldm::runtime {

namespace {

void lower_case(Piece &piece) {
    piece.leading = lower(std::u32string_view(piece.text).substr(0, piece.leading)).size();
    piece.text = lower(piece.text);
}

void normal_form_c(Piece &piece) {
    piece.leading = nfc(std::u32string_view(piece.text).substr(0, piece.leading)).size();
    piece.text = nfc(piece.text);
}

void strip(Piece &piece, bool left, bool right) {
    std::size_t start = 0, stop = piece.text.size();
    while (left && start < stop && is_space(piece.text[start])) ++start;
    while (right && stop > start && is_space(piece.text[stop - 1])) --stop;
    piece = piece.part(start, stop);
}

void replace(Piece &piece, const std::u32string &pattern, const std::u32string &content) {
    Piece done{{}, 0};
    const auto match = [&](std::size_t, std::size_t stop) {
        done.text += content;
        if (stop - 1 < piece.leading) done.leading += content.size();  // what is put in is where the last one was
    };
    const auto between = [&](std::size_t start, std::size_t stop) {
        const Piece part = piece.part(start, stop);
        done.text += part.text;
        done.leading += part.leading;
    };
    search(piece.text, pattern, match, between);
    piece = std::move(done);
}

constexpr std::size_t LARGEST_GROWTH = 1024;

// growth: is set to how many times as long it may make a text, but for what letter case and normal forms do
Normalizer normalizer_of(const Json &part, std::size_t &growth) {
    growth = 1;
    const std::string &kind = part["type"].text();
    if (kind == "Lowercase") return lower_case;
    if (kind == "NFC") return normal_form_c;
    if (kind == "Strip") {
        const bool left = need(part, "strip_left", Kind::boolean).boolean();
        const bool right = need(part, "strip_right", Kind::boolean).boolean();
        return [=](Piece &piece) { strip(piece, left, right); };
    }
    if (kind == "Replace") {
        const std::u32string pattern = pattern_of(part["pattern"]);
        const std::u32string content = decoded(need(part, "content", Kind::text).text());
        growth = (content.size() + pattern.size() - 1) / pattern.size();
        return [=](Piece &piece) { replace(piece, pattern, content); };
    }
    if (kind == "Precompiled") {
        const auto map = std::make_shared<const Charsmap>(need(part, "precompiled_charsmap", Kind::text).text());
        growth = map->longest();
        return [=](Piece &piece) { map->apply(piece); };
    }
    throw MalformedError(join("has the normalizer ", short_repr(kind), ", which is not read here"));
}

const char *name_in_python(Kind kind) {
    switch (kind) {
        case Kind::object: return "dict";
        case Kind::array: return "list";
        case Kind::text: return "str";
        case Kind::integer: return "int";
        case Kind::number: return "float";
        case Kind::boolean: return "bool";
    }
    return "";
}

}  // namespace

std::vector<Normalizer> normalizers_of(const Json &part) {
    std::vector<Normalizer> found;
    std::size_t largest = 1, growth = 1;
    for (const Json &each : sequence_of(part, "normalizers")) {
        found.push_back(normalizer_of(each, growth));
        largest *= std::max<std::size_t>(growth, 1);  // both are far from what cannot be held
        if (largest > LARGEST_GROWTH)
            throw MalformedError(join("has normalizers that make a text more than ", LARGEST_GROWTH, " times as long"));
    }
    return found;
}

std::vector<Json> sequence_of(const Json &part, const char *items) {
    if (part.is_null()) return {};
    const Json &kind = part["type"];
    const bool several = kind.is(Kind::text) && kind.text() == "Sequence";
    const Json parts = several ? part[items] : Json(Json::Array{part});
    bool fits = parts.is(Kind::array);
    for (std::size_t i = 0; fits && i < parts.array().size(); ++i) fits = parts.array()[i]["type"].is(Kind::text);
    if (!fits) throw MalformedError(join("has ", items, " that are no list of objects with a type"));
    return parts.array();
}

std::u32string pattern_of(const Json &pattern) {
    if (!pattern.is(Kind::object) || pattern.object().size() != 1 || !pattern["String"].is(Kind::text))
        throw MalformedError(join("has the pattern ", short_repr(pattern), "; a String is read here"));
    if (pattern["String"].text().empty()) throw MalformedError("has an empty pattern");
    return decoded(pattern["String"].text());
}

const Json &need(const Json &part, const char *key, Kind kind) {
    if (!part[key].is(kind))
        throw MalformedError(join("has ", key, " = ", short_repr(part[key]), "; a ", name_in_python(kind), " is needed"));
    return part[key];
}

}  // namespace ldm::runtime
