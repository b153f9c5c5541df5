#include "session.hpp"

#include "error.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cfenv>
#include <cstdlib>

#include <strings.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

namespace ldm::runtime {

namespace {

constexpr const char *CUDA = "CUDAExecutionProvider";
constexpr const char *YES[] = {"1", "true", "yes", "on"};  // what ONNX Runtime takes for yes in its environment variables

struct Type {
    ONNXTensorElementDataType type;
    const char *dtype;
    std::size_t bytes;
};
constexpr Type TYPES[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 4},
                          {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16", 2},
                          {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64", 8},
                          {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8", 1}};

const Type *type_of(ONNXTensorElementDataType type) {
    for (const Type &known : TYPES)
        if (known.type == type) return &known;
    return nullptr;
}

// Do what calls ONNX Runtime to run a graph, and turn what it throws into one sentence.
template <class Action>
auto running(const GraphSpec &spec, const Action &action) {
    try {
        return action();
    } catch (const Ort::Exception &error) {
        throw BackendError(
            join("ONNX Runtime could not run ", spec.name(), ": ", one_line(error.what()), ". Try a smaller size."));
    }
}

// The CPUs that this process is confined to; 0, the library's own choice, if it is not.
int allowed_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (::sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) < ::sysconf(_SC_NPROCESSORS_ONLN))
        return CPU_COUNT(&set);
#endif
    return 0;
}

// ONNX Runtime's releases from 1.29 on send telemetry, and write a number of the device below the home directory. What the
// user has set holds where it turns that off too.
void turn_telemetry_off() {
    constexpr const char *name = "ORT_DISABLE_TELEMETRY";
    const char *value = std::getenv(name);
    const bool off = value != nullptr && std::any_of(std::begin(YES), std::end(YES), [&](const char *yes) {
        return ::strcasecmp(value, yes) == 0;
    });
    if (!off) ::setenv(name, "1", 1);
}

void initialise() {
    turn_telemetry_off();
    const OrtApi *api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr)
        throw BackendError(join("The ONNX Runtime ", OrtGetApiBase()->GetVersionString(), " that was loaded is older than ",
                                "the one this library was built for (API ", ORT_API_VERSION, "). Use a newer one."));
    Ort::InitApi(api);
}

std::vector<TensorSpec> specs_of(const Ort::Session &session, bool inputs) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<TensorSpec> specs;
    const std::size_t count = inputs ? session.GetInputCount() : session.GetOutputCount();
    for (std::size_t i = 0; i < count; ++i) {
        const auto name = inputs ? session.GetInputNameAllocated(i, allocator) : session.GetOutputNameAllocated(i, allocator);
        const Ort::TypeInfo info = inputs ? session.GetInputTypeInfo(i) : session.GetOutputTypeInfo(i);
        TensorSpec spec{name.get(), "no tensor", {}};
        if (info.GetONNXType() == ONNX_TYPE_TENSOR) {
            const auto tensor = info.GetTensorTypeAndShapeInfo();
            const Type *type = type_of(tensor.GetElementType());
            spec.dtype = type == nullptr ? "another type" : type->dtype;
            for (const std::int64_t size : tensor.GetShape())
                spec.shape.push_back(size >= 0 ? Dimension{size} : Dimension{0, join(spec.name, ".", spec.shape.size())});
        }
        specs.push_back(std::move(spec));
    }
    return specs;
}

Ort::Value value_at(Tensor &tensor) {
    static const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPUInput);
    const Type *type = std::find_if(std::begin(TYPES), std::end(TYPES), [&](const Type &t) { return tensor.dtype == t.dtype; });
    return Ort::Value::CreateTensor(memory, tensor.data.data(), tensor.data.size(), tensor.shape.data(),
                                    tensor.shape.size(), type->type);
}

// Names and the values that lie under them, as Ort::Session::Run takes them.
struct Feed {
    explicit Feed(const TensorRefs &tensors) {
        for (const auto &[name, tensor] : tensors) {
            names.push_back(name);
            values.push_back(value_at(*tensor));
        }
        for (const std::string &name : names) pointers.push_back(name.c_str());
    }
    Feed(const Feed &) = delete;
    Feed &operator=(const Feed &) = delete;

    std::vector<std::string> names;
    std::vector<const char *> pointers;
    std::vector<Ort::Value> values;
};

class SessionGraph : public Graph {
  public:
    SessionGraph(Ort::Session session, GraphSpec spec) : Graph(std::move(spec)), session_(std::move(session)) {}

    Tensors run(const TensorRefs &inputs) const override {
        return running(spec(), [&] {
            const Feed feed(inputs);
            std::vector<const char *> names;
            for (const TensorSpec &tensor : spec().outputs) names.push_back(tensor.name.c_str());
            const std::vector<Ort::Value> values = session_.Run(Ort::RunOptions(nullptr), feed.pointers.data(),
                                                                 feed.values.data(), feed.values.size(), names.data(),
                                                                 names.size());
            Tensors results;
            for (std::size_t i = 0; i < names.size(); ++i) results.emplace(names[i], copy_of(values[i]));
            return results;
        });
    }

    Call bind(const TensorRefs &inputs, const TensorRefs &outputs, std::size_t) const override {
        return running(spec(), [&]() -> Call {
            const auto given = std::make_shared<Feed>(inputs), made = std::make_shared<Feed>(outputs);
            return [this, given, made] {
                running(spec(), [&] {
                    session_.Run(Ort::RunOptions(nullptr), given->pointers.data(), given->values.data(),
                                  given->values.size(), made->pointers.data(), made->values.data(), made->values.size());
                });
            };
        });
    }

  private:
    Tensor copy_of(const Ort::Value &value) const {
        const auto info = value.GetTensorTypeAndShapeInfo();
        const Type *type = type_of(info.GetElementType());
        if (type == nullptr) throw BundleError(spec().path + " gives a type that is not used here. Export the bundle anew.");
        const auto *bytes = static_cast<const std::byte *>(value.GetTensorRawData());
        return {type->dtype, info.GetShape(), {bytes, bytes + info.GetElementCount() * type->bytes}};
    }

    mutable Ort::Session session_;  // running one changes nothing that shows
};

// Have a model's weights taken from memory, and from no file.
void give_weights(const GraphFiles &files, Ort::SessionOptions &options) {
    std::vector<std::string> names;
    std::vector<char *> bytes;
    std::vector<std::size_t> sizes;
    for (const auto &[location, data] : files.data) {
        names.push_back(location);
        bytes.push_back(const_cast<char *>(data.data()));  // they are only read
        sizes.push_back(data.size());
    }
    options.AddExternalInitializersFromFilesInMemory(names, bytes, sizes);
    options.AddConfigEntry("session.model_external_initializers_file_folder_path", "/dev/null");
}

// Puts a thread's arithmetic back as it was: one that opens a process's first session rounds subnormals to zero after it.
class Arithmetic {
  public:
    Arithmetic() { std::fegetenv(&before_); }
    ~Arithmetic() { std::fesetenv(&before_); }
    Arithmetic(const Arithmetic &) = delete;
    Arithmetic &operator=(const Arithmetic &) = delete;

  private:
    std::fenv_t before_{};
};

}  // namespace

struct OnnxRuntime::Settings {
    Ort::Env env{nullptr};
    int threads = 0;

    Ort::SessionOptions options(Device device) const {
        Ort::SessionOptions options;
        options.SetLogSeverityLevel(3);
        options.DisableMemPattern();  // a plan of the memory holds it twice, and gained no time
        options.SetIntraOpNumThreads(threads);
        options.AddConfigEntry("session.set_denormal_as_zero", "1");
        options.AddConfigEntry("session.qdq_matmulnbits_accuracy_level", "1");  // fp32, not int8
        // every session has threads of its own, which else wait spinning for more work while another session's run
        options.AddConfigEntry("session.force_spinning_stop", "1");
        if (device == Device::cuda) {
            Ort::CUDAProviderOptions cuda;
            cuda.Update({{"use_tf32", "0"}});
            options.AppendExecutionProvider_CUDA_V2(*cuda);
        }
        return options;
    }
};

OnnxRuntime::OnnxRuntime(int threads) : settings_(std::make_unique<Settings>()) {
    static const bool once = (initialise(), true);
    static_cast<void>(once);
    settings_->env = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "ldm");
    settings_->threads = threads > 0 ? threads : allowed_threads();
}

OnnxRuntime::~OnnxRuntime() = default;

std::string OnnxRuntime::version() { return OrtGetApiBase()->GetVersionString(); }

bool OnnxRuntime::has_cuda() {
    const std::vector<std::string> providers = Ort::GetAvailableProviders();
    return std::find(providers.begin(), providers.end(), CUDA) != providers.end();
}

std::unique_ptr<Graph> OnnxRuntime::open(const GraphFiles &files, const std::string &path, const GraphSpec *spec,
                                         Device device) const {
    Ort::SessionOptions options{nullptr};
    try {
        options = settings_->options(device);
        if (files.in_memory) give_weights(files, options);
    } catch (const Ort::Exception &error) {
        throw BackendError(join("ONNX Runtime does not start: ", one_line(error.what()), ". Check its installation."));
    }
    const Arithmetic kept;
    try {
        Ort::Session session = files.in_memory
                                   ? Ort::Session(settings_->env, files.model.data(), files.model.size(), options)
                                   : Ort::Session(settings_->env, files.file.c_str(), options);
        GraphSpec there{path, specs_of(session, true), specs_of(session, false)};
        if (spec != nullptr && !(agree(spec->inputs, there.inputs) && agree(spec->outputs, there.outputs)))
            throw BundleError(path + " has other inputs or outputs than manifest.json says. Export the bundle anew.");
        return std::make_unique<SessionGraph>(std::move(session), spec == nullptr ? std::move(there) : *spec);
    } catch (const Ort::Exception &error) {
        const std::string why = one_line(error.what());
        if (device == Device::cuda) throw BackendError(join("CUDA does not start: ", why, ". Use the backend cpu."));
        throw BundleError(join("ONNX Runtime refuses ", path, ": ", why, ". Export the bundle anew."));
    }
}

}  // namespace ldm::runtime
