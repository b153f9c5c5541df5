// UTF-8 and normal forms where the rules have corners; the whole is held against `tokenizers` in test_same.py.
#include "bpe.hpp"
#include "cache.hpp"
#include "charsmap.hpp"
#include "json.hpp"
#include "noise.hpp"
#include "unicode.hpp"

#include <catch2/catch.hpp>

using namespace ldm::runtime;

TEST_CASE("UTF-8 that is not in its shortest form, a surrogate, or cut short is refused") {
    for (const char *text : {"", "a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xF4\x8F\xBF\xBF"}) CHECK(is_utf8(text));
    for (const char *text : {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
                             "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82", "\xC3", "a\xFF"})
        CHECK_FALSE(is_utf8(text));
    CHECK(decoded("a\xFF" "b") == U"a\uFFFDb");
    for (const std::u32string &text : {std::u32string(U"a\u00e9\u20ac\U0001F600"), std::u32string(U"\U0010FFFF")})
        CHECK(decoded(encoded(text)) == text);
}

TEST_CASE("Normal form C composes, orders and blocks") {
    CHECK(nfc(U"e\u0301") == U"\u00e9");
    CHECK(nfc(U"a\u0323\u0307") == nfc(U"a\u0307\u0323"));
    CHECK(nfc(U"\u1100\u1161\u11a8") == U"\uac01");
    CHECK(nfc(U"\uac00\u11a8") == U"\uac01");
    CHECK(nfc(U"\u0958") == U"\u0915\u093c");  // excluded from composition
    CHECK(nfc(U"\u212b") == U"\u00c5");
    CHECK(nfc(U"\u0301a") == U"\u0301a");
    CHECK(nfc(U"a\u0301\u0301") == U"\u00e1\u0301");
}

TEST_CASE("Lower case is that of Python, where a sigma ends a word too") {
    CHECK(lower(U"\u039f\u03a3") == U"\u03bf\u03c3");
    CHECK(python_lower(U"").empty());
    CHECK(python_lower(U"\u03a3") == U"\u03c3");
    CHECK(python_lower(U"\u039f\u03a3 \u03a3A") == U"\u03bf\u03c2 \u03c3a");
    CHECK(python_lower(U"A'\u03a3'\u0301") == U"a'\u03c2'\u0301");
    CHECK(python_lower(U"A1\u03a3 A\u03a31 A\u03a3.B") == U"a1\u03c3 a\u03c21 a\u03c3.b");
    CHECK(python_lower(U"\u02b0\u03a3 A\u03a3\u02b0") == U"\u02b0\u03c3 a\u03c2\u02b0");  // cased, and looked over
    CHECK(python_lower(U"\u0130\u01c5") == U"i\u0307\u01c6");
    CHECK(python_strip(U"\x1c\u0085 a b\u3000\x1f") == U"a b");
    CHECK(python_strip(U"\u200b a\ufeff") == U"\u200b a\ufeff");
    CHECK(python_strip(U" \n").empty());
}

TEST_CASE("Grapheme clusters end where Unicode Standard Annex 29 ends them") {
    const auto clusters = [](std::u32string_view text) {
        std::vector<std::size_t> lengths;
        for (; !text.empty(); text.remove_prefix(lengths.back())) lengths.push_back(cluster_length(text));
        return lengths;
    };
    using Lengths = std::vector<std::size_t>;
    CHECK(clusters(U"").empty());
    CHECK(clusters(U"a\r\nb\n\r") == Lengths{1, 2, 1, 1, 1});
    CHECK(clusters(U"e\u0301\u0301a") == Lengths{3, 1});
    CHECK(clusters(U"\u0301\u0301\n\u0301") == Lengths{2, 1, 1});
    CHECK(clusters(U"\u0600ab") == Lengths{2, 1});
    CHECK(clusters(U"\u0600\n") == Lengths{1, 1});
    CHECK(clusters(U"\u1100\u1100\u1161\u11a8\u11a8\u1161") == Lengths{5, 1});
    CHECK(clusters(U"\uac00\u11a8\uac01\u1161\uac00\u1161") == Lengths{2, 1, 1, 2});
    CHECK(clusters(U"\u00a9\u0301\u200d\u00a9\u200da") == Lengths{5, 1});
    CHECK(clusters(U"\u00a9\u200d\u200d\u00a9") == Lengths{3, 1});
    CHECK(clusters(U"a\u200d\u00a9") == Lengths{2, 1});
    CHECK(clusters(U"\u0915\u094d\u0915\u0300\u0915") == Lengths{4, 1});
    CHECK(clusters(U"\u0915\u200d\u0915") == Lengths{2, 1});
}

TEST_CASE("A map of characters that cannot be walked is refused") {
    for (const char *map : {"", "A", "AAAA", "====", "AAAAAA==", "AAQAAA==", "////////"})
        CHECK_THROWS_AS(Charsmap(map), MalformedError);
}

TEST_CASE("A part keeps what stands for the prompt's first character") {
    const Piece piece{U"abc", 2};
    CHECK(piece.part(0, 1).leading == 1);
    CHECK(piece.part(1, 3).leading == 1);
    CHECK(piece.part(2, 3).leading == 0);
    CHECK(piece.part(2, 3).text == U"c");
}

TEST_CASE("The best rank is merged first, then the leftmost") {
    Bpe bpe;  // a=0 b=1 c=2; bc=3 ab=4 abc=5
    bpe.add_merge(1, 2, 3);
    bpe.add_merge(0, 1, 4);
    bpe.add_merge(0, 3, 5);
    CHECK(bpe.merged({0, 1, 2}) == std::vector<TokenId>{5});
    CHECK(bpe.merged({0, 1, 0}) == std::vector<TokenId>{4, 0});
    CHECK(bpe.merged({}).empty());
    Bpe pairs;
    pairs.add_merge(0, 0, 1);
    CHECK(pairs.merged({0, 0, 0}) == std::vector<TokenId>{1, 0});
}

TEST_CASE("A cache forgets what was used longest ago") {
    Cache<int, int> cache(2);
    cache.insert(1, 10);
    cache.insert(2, 20);
    CHECK(*cache.find(1) == 10);
    cache.insert(3, 30);
    CHECK(cache.find(2) == nullptr);
    CHECK(*cache.find(1) == 10);
    CHECK(*cache.find(3) == 30);
}

TEST_CASE("Few values come one by one, and the spare outlives a larger draw") {
    Generator one(7), other(7);
    float a[3], b[20], c[1], d[2], e[20], f[2];
    one.randn(a, 3), one.randn(b, 20), one.randn(c, 1);
    other.randn(d, 2), other.randn(f, 1), other.randn(e, 20), other.randn(f + 1, 1);
    CHECK(a[2] == f[0]);
    CHECK(std::equal(b, b + 20, e));
    CHECK(c[0] == f[1]);
}
