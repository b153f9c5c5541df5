// What is read from a bundle: JSON, hashes, paths, ONNX's external data, plans, and the kind of processor.
#include "json.hpp"
#include "error.hpp"
#include "manifest.hpp"
#include "onnx_wire.hpp"
#include "plan.hpp"
#include "sha256.hpp"
#include "target.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <locale>

using namespace ldm::runtime;

TEST_CASE("SHA-256 of FIPS 180-4's examples and of every length around a block") {
    const auto digest = [](const std::string &text) {
        Sha256 sha;
        sha.update(text);
        return sha.hex_digest();
    };
    CHECK(digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(digest(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    for (std::size_t size = 0; size < 130; ++size) {
        Sha256 pieces;
        for (std::size_t i = 0; i < size; ++i) pieces.update("x");
        CHECK(pieces.hex_digest() == digest(std::string(size, 'x')));
    }
}

TEST_CASE("JSON that is ambiguous or deep is refused") {
    CHECK_THROWS_AS(parsed(R"({"a": 1, "a": 2})", Repeats::refused), MalformedError);
    CHECK(parsed(R"({"a": 1, "a": 2})", Repeats::allowed)["a"].integer() == 2);
    for (const char *text : {"", "{", "NaN", "[Infinity]", "1e400", "\xEF\xBB\xBF{}", "\"\\ud800\"", "\"\xff\"", "{} {}", "1e999", "\"\\ude00\"",
                             "{\"\\uDBFF\": 1}", "\"\xed\xa0\x80\"", "\"\xc0\x80\"", "01", "[1,]"})
        CHECK_THROWS_AS(parsed(text, Repeats::refused), MalformedError);
    using namespace std::string_view_literals;
    for (const std::string_view text : {"1\0"sv, "{}\0x"sv, "\"a\0b\""sv}) CHECK_THROWS_AS(parsed(text, Repeats::refused), MalformedError);
    CHECK_THROWS_AS(parsed("1" + std::string(400, '0'), Repeats::refused), MalformedError);
    CHECK(parsed("1" + std::string(300, '0'), Repeats::refused).number() == 1e300);
    CHECK_THROWS_AS(parsed(std::string(100000, '['), Repeats::refused), MalformedError);
    CHECK_NOTHROW(parsed(std::string(500, '[') + std::string(500, ']'), Repeats::refused));
    CHECK_THROWS_AS(parsed(std::string(501, '[') + std::string(501, ']'), Repeats::refused), MalformedError);
    CHECK_THROWS_AS(field(parsed(R"({"a": true})", Repeats::refused), "a", Kind::integer), MalformedError);
    CHECK_THROWS_AS(field(parsed(R"({"a": 1.0})", Repeats::refused), "a", Kind::integer), MalformedError);
    CHECK_THROWS_AS(field(parsed(R"({"a": 18446744073709551615})", Repeats::refused), "a", Kind::integer), MalformedError);
}

TEST_CASE("JSON is read and written as it was") {
    for (const char *text : {"null", "true", "false", "0", "-9223372036854775808", "9223372036854775807", "0.5", "\"\"", "[]", "{}",
                             R"({"a":[1,-2.5,"x\"\\\u0001é",{}],"b":{"c":null}})", R"("\u0000")"})
        CHECK(parsed(text, Repeats::refused).dump() == text);
    const Json whole = parsed(R"({"a": {"b": [7]}, "c": 18446744073709551615})", Repeats::refused);
    CHECK(whole["a"]["b"].array()[0].integer() == 7);
    CHECK(whole["x"]["b"].is_null());
    CHECK(whole["a"]["b"]["c"].is_null());
    CHECK(whole["c"].number() == 18446744073709551615.0);
    CHECK(parsed(R"({"a": [1, 2], "a": {}})", Repeats::allowed).dump() == R"({"a":{}})");
    CHECK(std::string(whole["c"].type()) == "a number");
}

TEST_CASE("Numbers are written alike in every locale") {
    struct Grouped : std::numpunct<char> {
        char do_thousands_sep() const override { return '.'; }
        std::string do_grouping() const override { return "\3"; }
    };
    const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouped));
    const std::string text = join(1000, " ", 0.5);
    std::locale::global(before);
    CHECK(text == "1000 0.5");
}

TEST_CASE("Paths stay inside the folder") {
    CHECK_NOTHROW(check_path("unet/model.onnx"));
    for (const char *path : {"", "/", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.", "a.", "a ", " a", "a\\b", "C:a", "a\nb",
                             "a*", "a?", "a|b", "a<b"})
        CHECK_THROWS_AS(check_path(path), MalformedError);
}

namespace {

std::string varint(std::uint64_t value, std::size_t least_bytes = 1) {
    std::string bytes;
    while (value > 0x7f || bytes.size() + 1 < least_bytes) {
        bytes += static_cast<char>((value & 0x7f) | 0x80);
        value >>= 7;
    }
    return bytes + static_cast<char>(value);
}

std::string bytes_field(std::uint64_t number, const std::string &payload) {
    return varint(number << 3 | 2) + varint(payload.size()) + payload;
}

std::string model_with(const std::string &tensor) { return bytes_field(7, bytes_field(5, tensor)); }

std::string entry(const std::string &key, const std::string &value) {
    return bytes_field(13, bytes_field(1, key) + bytes_field(2, value));
}

const std::string OUTSIDE = varint(14 << 3) + "\x01";  // data_location: external

std::string node(const std::string &op_type) { return bytes_field(1, bytes_field(4, op_type) + bytes_field(7, "f")); }

// A function of so many calls of another.
std::string function(const std::string &name, const std::string &calls, int count) {
    std::string body = bytes_field(1, name) + bytes_field(10, "f");
    for (int k = 0; k < count; ++k) body += bytes_field(7, bytes_field(4, calls) + bytes_field(7, "f"));
    return bytes_field(25, body);
}

bool refused(const std::string &model) {
    try {
        external_data_from_bytes(model);
        return false;
    } catch (const MalformedError &) {
        return true;
    }
}

}  // namespace

TEST_CASE("External data is found, and a model that is cut short anywhere is refused or has none") {
    const std::string model = model_with(bytes_field(8, "w") + entry("location", "a.bin") + entry("offset", "64") +
                                         entry("length", "8") + entry("prepacked_0", "x") + OUTSIDE);
    const auto found = external_data_from_bytes(model);
    REQUIRE(found.size() == 1);
    CHECK(found[0].tensor == "w");
    CHECK(found[0].location == "a.bin");
    CHECK(found[0].offset == 64);
    CHECK(found[0].length == 8);
    for (std::size_t size = 0; size < model.size(); ++size) CHECK(refused(model.substr(0, size)));
    for (const std::string &tensor :
         {entry("offset", "64") + OUTSIDE, entry("location", "a") + entry("offset", "-1") + OUTSIDE,
          entry("location", "a") + entry("location", "b") + OUTSIDE, entry("location", "a"),
          entry("location", "a") + varint(14 << 3) + std::string(1, '\0'), entry("location", "a") + OUTSIDE + OUTSIDE,
          entry("location", "a") + bytes_field(9, "raw") + OUTSIDE, OUTSIDE, entry("location", "a") + entry("base", "/") + OUTSIDE,
          bytes_field(13, bytes_field(1, "location") + bytes_field(2, "a") + bytes_field(2, "b")) + OUTSIDE})
        CHECK(refused(model_with(tensor)));
    std::string deep = bytes_field(5, entry("location", "a") + OUTSIDE);
    for (int i = 0; i < 60; ++i) deep = bytes_field(1, bytes_field(5, bytes_field(6, deep)));
    CHECK(refused(bytes_field(7, deep)));
}

TEST_CASE("A model that two readers of protobuf could read differently is refused") {
    const std::string sound = bytes_field(7, bytes_field(2, "g"));
    CHECK_FALSE(refused(sound));
    CHECK_FALSE(refused(sound + varint(1000 << 3) + std::string(9, '\xff') + '\x01'));
    for (const std::string &more :
         {sound, varint(7 << 3) + '\1', std::string("\xea\x80\x80\x80\x10\x00", 6), varint(1000 << 3 | 2, 5) + std::string(1, '\0'),
          varint(1000 << 3 | 2) + varint(1, 2) + "x", varint(1000 << 3) + std::string(9, '\xff') + '\x7f',
          varint(1000 << 3) + std::string(10, '\xff') + '\x01', varint(1000 << 3 | 3) + varint(1000 << 3 | 4),
          varint(1000 << 3 | 6) + '\1', std::string(1, '\0'), std::string("\x02\x01x"), varint(1000 << 3 | 5) + "xxx"})
        CHECK(refused(sound + more));
    CHECK(refused(std::string("\x3a\x06\x12\x04ORTM", 8)));
}

TEST_CASE("Functions that would be inlined into very many nodes, or call themselves, are refused") {
    const auto levels = [](int depth, int calls) {
        std::string model = bytes_field(7, node("F0"));
        for (int k = 0; k < depth; ++k) model += function(join("F", k), join("F", k + 1), calls);
        return model;
    };
    CHECK_FALSE(refused(levels(10, 2)));
    CHECK_FALSE(refused(levels(90, 1)));
    CHECK(refused(levels(110, 1)));
    CHECK(refused(levels(39, 2)));
    CHECK(refused(levels(7, 8)));
    CHECK(refused(bytes_field(7, node("A")) + function("A", "B", 1) + function("B", "A", 1)));
    CHECK(refused(bytes_field(7, node("A")) + function("A", "B", 1) + function("A", "B", 1)));
    CHECK(refused(bytes_field(7, node("EPContext"))));
}

TEST_CASE("A plan is checked whole") {
    const std::string row = R"({"timestep": 1, "input_scale": 1, "from_sample": 0, "from_output": 0, "clip": 0, "keep": 1,
                                "direct": 0, "weights": WEIGHTS, "noise": 0})";
    const auto plan = [&](const std::string &weights, const std::string &resume = "0", const std::string &steps = "1") {
        std::string text = row;
        text.replace(text.find("WEIGHTS"), 7, weights);
        return R"({"format_version": 1, "sampler": "s", "num_inference_steps": )" + steps +
               R"(, "init_scale": 1, "rows": [)" + text +
               R"(], "entries": [{"image_scale": 1, "noise_scale": 1, "warmup": [], "resume": )" + resume + "}]}";
    };
    CHECK(plan_from_json(plan("[0.5]")).starting_at(0).rows.size() == 1);
    CHECK(plan_from_json(plan("[0.5]")).first_step(1) == 0);
    CHECK(plan_from_json(plan("[0.5]")).rows[0].weights == std::vector<double>{0.5});
    for (const std::string &text : {plan("[1, 1]"), plan("[1e400]"), plan("1"), plan("[true]"), plan("[]", "1"), plan("[]", "2"),
                                    plan("[1e39]"), plan("[]", "-1"), plan("[]", "0", "2"), plan("[]", "0", "0"), plan("[]", "0", "1e3"),
                                    std::string("{}"), std::string("[]"), std::string("x")})
        CHECK_THROWS_AS(plan_from_json(text), InputError);
    std::string of_fewer_calls = plan("[]", "1", "2");
    of_fewer_calls.insert(of_fewer_calls.rfind(']'), R"(, {"image_scale": 1, "noise_scale": 1, "warmup": [], "resume": 0})");
    CHECK_THROWS_AS(plan_from_json(of_fewer_calls), InputError);  // its first entry runs nothing
    of_fewer_calls.replace(of_fewer_calls.find(R"("resume": 1)"), 11, R"("resume": 0)");
    CHECK(plan_from_json(of_fewer_calls).starting_at(1).rows.size() == 1);
    CHECK_THROWS_AS(plan_from_json(plan("[]")).first_step(0), InputError);
    CHECK_THROWS_AS(plan_from_json(plan("[]")).first_step(std::nan("")), InputError);
    CHECK_THROWS_AS(plan_from_json(plan("[]")).first_step(1.5), InputError);
}

TEST_CASE("The kind of processor is told as Python tells it") {
    CHECK(cpu_level("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: X\nflags\t\t: fpu avx2 avx sse4_1\n") ==
          "GenuineIntel 6 85 avx avx2 sse4_1");
    CHECK(cpu_level("CPU implementer\t: 0x41\nFeatures\t: fp asimd i8mm bf16 crc32\n") == "0x41 asimd bf16 i8mm");
    CHECK(cpu_level("vendor_id\t: GenuineIntel\n").empty());
}
