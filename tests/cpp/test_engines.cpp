// Engines of a bundle as they are read, and which fit, without TensorRT. Each lie that a target.json can tell, as in
// tests/bundle/test_engines.py, is in test_engines.py too, where a library with TensorRT is told it.
#include "engines.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <fstream>

#include <unistd.h>

using namespace ldm::runtime;

namespace {

const Flavour &RTX = *flavour_of("tensorrt-rtx");
const std::string SOURCE_SHA(64, 'a');
#define SHA "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
const std::string EMPTY_SHA = SHA;

// A target of a UNet's engine, as its target.json.
Json document(const std::string &kind, const std::string &precision) {
    return parsed(R"({"format_version": 2, "flavour": "tensorrt_rtx", "version": "1.7.1.116", "refittable": false,
        "compute_capabilities": ["8.6", "12.0"], "stripped": false, "sparse": false, "report": {}, "kind": ")" + kind +
        R"(", "precision": ")" + precision + R"(", "files": {"unet.plan": {"size_bytes": 0, "sha256": ")" + EMPTY_SHA +
        R"("}},
        "engines": {"unet": {"path": "unet.plan", "source": "unet/model.onnx", "seconds": 1.5,
            "source_hashes": {"unet/model.onnx": ")" + SOURCE_SHA + R"("},
            "inputs": [{"name": "sample", "dtype": "float32", "shape": [-1, 4, -1, -1]},
                       {"name": "timestep", "dtype": "float32", "shape": []}],
            "outputs": [{"name": "out_sample", "dtype": "float32", "shape": [-1, 4, -1, -1]}],
            "profile": {"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 16, 16]}}}}})", Repeats::refused);
}

Json fp16() { return document("rtx-sm86-sm120-fp16", "fp16"); }

// What lies at a path, such as "engines/unet/inputs/0".
Json &at(Json &found, std::string_view path) {
    if (path.empty()) return found;
    const std::string key(path.substr(0, path.find('/')));
    Json &next = found.is(Kind::array) ? found.array().at(std::stoul(key)) : found.object()[key];
    return at(next, path.size() == key.size() ? "" : path.substr(key.size() + 1));
}

EngineDocument read(const Json &found) { return engines_from_json(found.dump(), "rtx-sm86-sm120-fp16"); }

// A bundle of a UNet alone, in a folder that goes with it.
struct WithTargets {
    WithTargets() { fs::create_directories(path); }
    ~WithTargets() { fs::remove_all(path); }

    void add(const Json &found) const {
        const fs::path target = path / TARGETS / found["kind"].text();
        fs::create_directories(target);
        std::ofstream(target / "target.json") << found.dump();
        std::ofstream(target / "unet.plan").flush();
    }
    std::string why(const std::string &version = "1.7.1.116", const std::string &capability = "8.6") const {
        try {
            fitting_engines(bundle, RTX, version, capability);
        } catch (const BackendError &error) {
            return error.what();
        }
        return "";
    }

    fs::path path = fs::temp_directory_path() / join("ldm_engines.", ::getpid());
    std::map<std::string, FileEntry> files{{"unet/model.onnx", {1, SOURCE_SHA}}};
    Bundle bundle{{files, {{"unet", {"unet/model.onnx", {}, {}}}}, {}, {}}, {Folder(path), "", MANIFEST, files, true}};
};

}  // namespace

TEST_CASE("What a target.json says of engines is read") {
    const EngineDocument target = read(fp16());
    CHECK(target.kind == "rtx-sm86-sm120-fp16");
    CHECK(target.flavour == "tensorrt_rtx");
    CHECK(target.compute_capabilities == std::vector<std::string>{"8.6", "12.0"});
    const Engine &engine = target.engines.at("unet");
    CHECK(engine.path == "unet.plan");
    CHECK(engine.profile.at("sample").max == Shape{8, 4, 16, 16});
    REQUIRE(engine.inputs.size() == 2);
    CHECK(engine.inputs[0].shape[0].is_free());
    CHECK(engine.inputs[0].shape[1].size == 4);
    CHECK(engine.inputs[0].shape[2].name != engine.inputs[0].shape[3].name);
    CHECK(engine.inputs[1].shape.empty());
}

TEST_CASE("Every field of a target.json of engines is needed, and of its kind") {
    for (const std::string holder : {"", "engines/unet", "engines/unet/inputs/0", "engines/unet/profile/sample"}) {
        Json whole = fp16();
        const Json::Object members = at(whole, holder).object();
        for (const auto &[key, right] : members) {
            Json found = whole;
            at(found, holder).object().erase(key);
            CHECK_THROWS_AS(read(found), MalformedError);
            for (const Json &other : {Json(), Json(false), Json("no"), Json(std::int64_t{1}), Json(Json::Array{Json(1.5)}),
                                      Json(Json::Object{{"a", Json(1.5)}})}) {
                const bool alike = std::string(other.type()) == right.type();
                if (alike || (other.is(Kind::number) && right.is(Kind::number))) continue;
                at(found, holder).object()[key] = other;
                CHECK_THROWS_AS(read(found), MalformedError);
            }
        }
    }
    for (const auto &[path, value] : std::vector<std::pair<const char *, const char *>>{
             {"format_version", "1"},
             {"kind", R"("rtx-sm86")"},
             {"precision", R"("fp32")"},
             {"flavour", R"("trt")"},
             {"compute_capabilities", R"(["8.6"])"},
             {"compute_capabilities/0", "8.6"},
             {"engines/unet/inputs/0/shape/0", "-2"},
             {"engines/unet/inputs/0/shape/0", R"("batch")"},
             {"engines/unet/profile/sample/min/0", "1.5"},
             {"files", R"({"../unet.plan": {"size_bytes": 0, "sha256": ")" SHA R"("}})"}}) {
        INFO(path << " is " << value);
        Json found = fp16();
        at(found, path) = parsed(value, Repeats::refused);
        CHECK_THROWS_AS(read(found), MalformedError);
    }
}

TEST_CASE("An engine says of which shapes it takes no input") {
    const Engine engine = read(fp16()).engines.at("unet");
    CHECK_NOTHROW(engine.check_shape("sample", {1, 4, 8, 8}, ""));
    CHECK_NOTHROW(engine.check_shape("sample", {8, 4, 16, 16}, ""));
    CHECK_NOTHROW(engine.check_shape("timestep", {}, ""));
    for (const Shape &shape :
         {Shape{9, 4, 8, 8}, Shape{1, 4, 7, 8}, Shape{1, 4, 8, 17}, Shape{1, 4, 8}, Shape{1, 4, 8, 8, 1}})
        CHECK_THROWS_AS(engine.check_shape("sample", shape, ""), InputError);
    CHECK_THROWS_WITH(engine.check_shape("sample", {9, 4, 8, 8}, "ldm-export build"),
                      "unet.plan would be given 'sample' of shape (9, 4, 8, 8); it was built for (1, 4, 8, 8) to "
                      "(8, 4, 16, 16). Ask for pictures of such a size and number, use another backend, or run, with a "
                      "larger --batch or --size: ldm-export build");
}

TEST_CASE("The fastest engines that fit are taken, and of the others it is said why not") {
    const WithTargets folder;
    const std::string command = "Run: ldm-export build " + folder.path.string() + " --target rtx --sm 86";
    CHECK(folder.why() == folder.path.string() + " has no tensorrt_rtx engines for this GPU. " + command);
    folder.add(document("rtx-sm86-sm120", "fp32"));
    folder.add(fp16());
    fs::create_directories(folder.path / TARGETS / "ort-cpu");
    CHECK(engine_targets(folder.bundle, RTX) == std::vector<std::string>{"rtx-sm86-sm120", "rtx-sm86-sm120-fp16"});
    CHECK(engine_targets(folder.bundle, *flavour_of("tensorrt")).empty());
    CHECK(fitting_engines(folder.bundle, RTX, "1.7.1.116", "12.0").document.precision == "fp16");

    const auto says = [](const std::string &sentence, const std::string &part) {
        return sentence.find(part) != std::string::npos;
    };
    CHECK(says(folder.why("1.8"), "fp16 does not fit: it was made with tensorrt_rtx 1.7.1.116, and this is 1.8"));
    CHECK(says(folder.why("1.7.1.116", "8.9"), "it was made for compute capability 8.6, 12.0, and this device has 8.9"));
    CHECK(says(folder.why("1.7.1.116", "8.9"), "--target rtx --sm 89"));
    Json found = fp16();
    at(found, "stripped") = Json(true);
    folder.add(found);
    CHECK(fitting_engines(folder.bundle, RTX, "1.7.1.116", "8.6").document.precision == "fp32");
    const auto refuse = [&](const char *path, const char *value, const std::string &reason) {
        Json changed = document("rtx-sm86-sm120", "fp32");
        at(changed, path) = parsed(value, Repeats::refused);
        folder.add(changed);
        CHECK(says(folder.why(), "targets/rtx-sm86-sm120 does not fit: " + reason));
    };
    refuse("engines/unet/path", R"("../../unet/model.onnx")", "its ../../unet/model.onnx is missing");
    refuse("engines/unet/source_hashes", R"({"unet/model.onnx": "b"})", "its unet was made from other graphs");
    refuse("engines/unet/source_hashes", "{}", "its unet does not say what it was made from");
    refuse("engines/unet/profile", "{}", "its unet has a profile for nothing, and free sizes in sample");
    refuse("engines/unet/profile/sample/min/0", "3",
           "its unet takes sample of (-1, 4, -1, -1), and has a profile of (3, 4, 8, 8)");
    refuse("files/unet.plan/size_bytes", "7", "its unet.plan has 0 bytes; target.json says 7");
    const std::string other = '"' + SOURCE_SHA + '"';
    refuse("files/unet.plan/sha256", other.c_str(), "its unet.plan has been altered");
    fs::remove(folder.path / TARGETS / "rtx-sm86-sm120" / "unet.plan");
    CHECK(says(folder.why(), "its unet.plan is missing"));
    fs::create_symlink("/etc/passwd", folder.path / TARGETS / "rtx-sm86-sm120" / "unet.plan");
    CHECK(says(folder.why(), "its unet.plan is a link"));
}
