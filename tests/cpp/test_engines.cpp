// Engines of a bundle as they are read, and which fit, without TensorRT. Each lie that a target.json can tell, as in
// tests/test_engines.py, is in test_engines.py too, where a library with TensorRT is told it.
#include "engines.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <fstream>

#include <unistd.h>

using namespace ldm::runtime;

namespace {

const Flavour &RTX = *flavour_of("tensorrt-rtx");
const std::string SOURCE_SHA(64, 'a');
const std::string EMPTY_SHA = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

// A target of a UNet's engine, and its target.json.
Json document(const std::string &kind, const std::string &precision) {
    Json found = parsed(R"({"format_version": 1, "flavour": "tensorrt_rtx", "version": "1.7.1.116", "refittable": false,
        "compute_capabilities": ["8.6", "12.0"], "stripped": false, "sparse": false, "report": {},
        "engines": {"unet": {"path": "unet.plan", "source": "unet/model.onnx", "seconds": 1.5, "made_from": {},
            "inputs": [{"name": "sample", "dtype": "float32", "shape": [-1, 4, -1, -1]},
                       {"name": "timestep", "dtype": "float32", "shape": []}],
            "outputs": [{"name": "out_sample", "dtype": "float32", "shape": [-1, 4, -1, -1]}],
            "profile": {"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 16, 16]}}}}})", Repeats::refused);
    found["kind"] = kind;
    found["precision"] = precision;
    found["engines"]["unet"]["made_from"]["unet/model.onnx"] = SOURCE_SHA;
    found["files"]["unet.plan"] = {{"size_bytes", 0}, {"sha256", EMPTY_SHA}};
    return found;
}

Json fp16() { return document("rtx-sm86-sm120-fp16", "fp16"); }

EngineTarget read(const Json &found) { return engines_from_json(found.dump(), "targets/rtx-sm86-sm120-fp16"); }

// A bundle of a UNet alone, in a folder that goes with it.
struct Folder {
    Folder() : bundle{fs::temp_directory_path() / join("ldm_engines.", ::getpid()), {}, true} {
        bundle.manifest.files["unet/model.onnx"] = {1, SOURCE_SHA};
        bundle.manifest.graphs["unet"] = {"unet/model.onnx", {}, {}};
    }
    ~Folder() { fs::remove_all(bundle.path); }

    void add(const Json &found) const {
        const fs::path target = bundle.path / TARGETS / found["kind"].get<std::string>();
        fs::create_directories(target);
        std::ofstream(target / "target.json") << found;
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

    Bundle bundle;
};

}  // namespace

TEST_CASE("What a target.json says of engines is read") {
    const EngineTarget target = read(fp16());
    CHECK(target.kind() == "rtx-sm86-sm120-fp16");
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
    const Json whole = fp16();
    const auto refuse_without = [&](const Json::json_pointer &holder) {
        for (const auto &[key, _] : whole[holder].items()) {
            Json found = whole;
            found[holder].erase(key);
            CHECK_THROWS_AS(read(found), MalformedError);
            for (const Json &other : {Json(nullptr), Json(false), Json("no"), Json(1), Json::array({1}), Json{{"a", 1}}}) {
                found[holder][key] = other;
                const Json &right = whole[holder][key];
                if (other.type() != right.type() && !(other.is_number() && right.is_number()))
                    CHECK_THROWS_AS(read(found), MalformedError);
            }
        }
    };
    for (const char *holder : {"", "/engines/unet", "/engines/unet/inputs/0", "/engines/unet/profile/sample"})
        refuse_without(Json::json_pointer(holder));
    const auto refuse = [&](const char *at, const Json &value) {
        Json found = whole;
        found[Json::json_pointer(at)] = value;
        CHECK_THROWS_AS(read(found), MalformedError);
    };
    refuse("/format_version", 2);
    refuse("/kind", "rtx-sm86");
    refuse("/precision", "fp32");
    refuse("/flavour", "trt");
    refuse("/compute_capabilities", {"8.6"});
    refuse("/compute_capabilities/0", 8.6);
    refuse("/engines/unet/inputs/0/shape/0", -2);
    refuse("/engines/unet/inputs/0/shape/0", "batch");
    refuse("/engines/unet/profile/sample/min/0", 1.0);
    refuse("/files/..~1unet.plan", {{"size_bytes", 0}, {"sha256", EMPTY_SHA}});
}

TEST_CASE("An engine says of which shapes it takes no input") {
    const Engine engine = read(fp16()).engines.at("unet");
    CHECK_NOTHROW(engine.check_shape("sample", {1, 4, 8, 8}, ""));
    CHECK_NOTHROW(engine.check_shape("sample", {8, 4, 16, 16}, ""));
    CHECK_NOTHROW(engine.check_shape("timestep", {}, ""));
    for (const Shape &shape : {Shape{9, 4, 8, 8}, Shape{1, 4, 7, 8}, Shape{1, 4, 8, 17}, Shape{1, 4, 8}, Shape{1, 4, 8, 8, 1}})
        CHECK_THROWS_AS(engine.check_shape("sample", shape, ""), InputError);
    CHECK_THROWS_WITH(engine.check_shape("sample", {9, 4, 8, 8}, "ldm-export build"),
                      "unet.plan would be given 'sample' of shape (9, 4, 8, 8); it was built for (1, 4, 8, 8) to (8, 4, 16, 16). "
                      "Ask for pictures of such a size and number, use another backend, or run, with a larger --batch or "
                      "--size: ldm-export build");
}

TEST_CASE("The fastest engines that fit are taken, and of the others it is said why not") {
    const Folder folder;
    const std::string command = "Run: ldm-export build " + folder.bundle.path.string() + " --target rtx --sm 86";
    CHECK(folder.why() == folder.bundle.path.string() + " has no tensorrt_rtx engines for this GPU. " + command);
    folder.add(document("rtx-sm86-sm120", "fp32"));
    folder.add(fp16());
    fs::create_directories(folder.bundle.path / TARGETS / "ort-cpu");
    CHECK(engine_targets(folder.bundle, RTX) == std::vector<std::string>{"rtx-sm86-sm120", "rtx-sm86-sm120-fp16"});
    CHECK(engine_targets(folder.bundle, *flavour_of("tensorrt")).empty());
    CHECK(fitting_engines(folder.bundle, RTX, "1.7.1.116", "12.0").precision == "fp16");

    const auto says = [](const std::string &sentence, const std::string &part) { return sentence.find(part) != std::string::npos; };
    CHECK(says(folder.why("1.8"), "fp16 does not fit: it was made with tensorrt_rtx 1.7.1.116, and this is 1.8"));
    CHECK(says(folder.why("1.7.1.116", "8.9"), "it was made for compute capability 8.6, 12.0, and this device has 8.9"));
    CHECK(says(folder.why("1.7.1.116", "8.9"), "--target rtx --sm 89"));
    Json found = fp16();
    found["stripped"] = true;
    folder.add(found);
    CHECK(fitting_engines(folder.bundle, RTX, "1.7.1.116", "8.6").precision == "fp32");
    for (const auto &[change, reason] : std::vector<std::pair<Json, std::string>>{
             {{{"path", "../../unet/model.onnx"}}, "its ../../unet/model.onnx is missing"},
             {{{"made_from", {{"unet/model.onnx", "b"}}}}, "its unet was made from other graphs"},
             {{{"made_from", Json::object()}}, "its unet does not say what it was made from"},
             {{{"profile", Json::object()}}, "its unet has a profile for nothing, and free sizes in sample"}}) {
        found = document("rtx-sm86-sm120", "fp32");
        found["engines"]["unet"].update(change);
        folder.add(found);
        CHECK(says(folder.why(), "targets/rtx-sm86-sm120 does not fit: " + reason));
    }
    found = document("rtx-sm86-sm120", "fp32");
    found["files"]["unet.plan"]["sha256"] = SOURCE_SHA;
    folder.add(found);
    CHECK(says(folder.why(), "its unet.plan has been altered"));
    fs::remove(folder.bundle.path / TARGETS / "rtx-sm86-sm120" / "unet.plan");
    CHECK(says(folder.why(), "its unet.plan is missing"));
    fs::create_symlink("/etc/passwd", folder.bundle.path / TARGETS / "rtx-sm86-sm120" / "unet.plan");
    CHECK(says(folder.why(), "its unet.plan is a link or a device"));
}
