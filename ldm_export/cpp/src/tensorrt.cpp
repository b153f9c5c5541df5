#include "tensorrt.hpp"

#include "cuda.hpp"

#include <NvInferRuntime.h>

#include <algorithm>
#include <mutex>

// Exported by every release, declared by not every one.
extern "C" {
int32_t getInferLibMajorVersion() noexcept;
int32_t getInferLibMinorVersion() noexcept;
int32_t getInferLibPatchVersion() noexcept;
int32_t getInferLibBuildVersion() noexcept;
}

namespace ldm::runtime {

namespace {

const Flavour &BUILT = FLAVOURS[LDM_TENSORRT_RTX ? 0 : 1];

std::string version() {
    return join(getInferLibMajorVersion(), ".", getInferLibMinorVersion(), ".", getInferLibPatchVersion(), ".",
                getInferLibBuildVersion());
}

// Keeps what TensorRT complained of last.
class Log : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char *text) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = one_line(text);
        } catch (const std::bad_alloc &) {
        }
    }
    std::string last() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_;
    }
    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        last_.clear();
    }

  private:
    mutable std::mutex mutex_;
    std::string last_;
};

// TensorRT's own entry, which engines outlive in no case.
struct Library {
    Log log;
    std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(log)};

    // The error for a call that gave nothing, with TensorRT's own words.
    BackendError failed(const std::string &doing) const {
        const std::string why = log.last();
        return BackendError(join(BUILT.library, " ", version(), " could not ", doing, why.empty() ? "" : ": ", why,
                                 ". Use the backend cpu."));
    }
};

struct Type {
    nvinfer1::DataType type;
    const char *dtype;
    std::size_t bytes;
};
constexpr Type TYPES[] = {{nvinfer1::DataType::kFLOAT, "float32", 4},
                          {nvinfer1::DataType::kHALF, "float16", 2},
                          {nvinfer1::DataType::kINT64, "int64", 8},
                          {nvinfer1::DataType::kUINT8, "uint8", 1}};

const Type *type_of(nvinfer1::DataType type) {
    const Type *found = std::find_if(std::begin(TYPES), std::end(TYPES), [&](const Type &one) { return one.type == type; });
    return found == std::end(TYPES) ? nullptr : found;
}

using Shapes = std::map<std::string, Shape>;

// An engine with memory for inputs of some shapes, on a stream of its own.
class Bound {
  public:
    Bound(const Library &library, nvinfer1::ICudaEngine &engine, const Engine &facts)
        : library_(library), engine_(engine), engine_facts_(facts), context_(context_of(engine)) {
        if (context_ == nullptr) throw library_.failed("make room for " + engine_facts_.path + " on the GPU");
    }

    const Shapes &shapes() const { return shapes_; }
    std::size_t bytes(const std::string &name) const { return buffers_.at(name).bytes(); }

    void take(const Shapes &shapes) {
        shapes_.clear();  // until all is there
        for (const auto &[name, _] : engine_facts_.profile) {  // the others have one shape
            const Shape &shape = shapes.at(name);
            nvinfer1::Dims dims{static_cast<int32_t>(shape.size()), {}};
            std::copy(shape.begin(), shape.end(), dims.d);
            if (!context_->setInputShape(name.c_str(), dims)) throw library_.failed(join("take ", name, " in ", engine_facts_.path));
        }
        if (context_->inferShapes(0, nullptr) != 0) throw library_.failed("tell the shapes of " + engine_facts_.path);
        buffers_.clear();
        for (int32_t k = 0; k < engine_.getNbIOTensors(); ++k) {
            const char *name = engine_.getIOTensorName(k);
            const std::size_t count = count_of(shape_of(name));
            const Buffer &buffer =
                buffers_.try_emplace(name, count * type_of(engine_.getTensorDataType(name))->bytes).first->second;
            if (!context_->setTensorAddress(name, buffer.address()))
                throw library_.failed(join("use its memory for ", name, " of ", engine_facts_.path));
        }
        shapes_ = shapes;
    }

    void upload(const std::string &name, const Tensor &tensor) { fitting(name, tensor).upload(tensor, stream_); }
    void download(const std::string &name, Tensor &tensor) { fitting(name, tensor).download(tensor, stream_); }
    void launch() {
        if (!context_->enqueueV3(stream_.handle())) throw library_.failed("run " + engine_facts_.path);
    }
    void wait() const { stream_.wait(); }

    Shape shape_of(const char *name) const {
        const nvinfer1::Dims dims = context_->getTensorShape(name);
        const Shape shape(dims.d, dims.d + std::max(dims.nbDims, 0));
        if (dims.nbDims < 0 || std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; }))
            throw library_.failed(join("tell the shape of ", name, " of ", engine_facts_.path));
        return shape;
    }

  private:
    static nvinfer1::IExecutionContext *context_of(nvinfer1::ICudaEngine &engine) {
#if LDM_TENSORRT_RTX
        const std::unique_ptr<nvinfer1::IRuntimeConfig> config(engine.createRuntimeConfig());
        if (config == nullptr) return nullptr;
        // else it runs with slower kernels, compiles better ones meanwhile, and may change to them within a picture
        config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
        return engine.createExecutionContext(config.get());
#else
        return engine.createExecutionContext();
#endif
    }

    Buffer &fitting(const std::string &name, const Tensor &tensor) {
        Buffer &buffer = buffers_.at(name);
        if (buffer.bytes() != tensor.data.size())
            throw BackendError(join(engine_facts_.path, " has ", buffer.bytes(), " bytes of '", name, "', and ", tensor.data.size(),
                                    " are there. Build the target anew."));
        return buffer;
    }

    const Library &library_;
    nvinfer1::ICudaEngine &engine_;
    const Engine &engine_facts_;
    Stream stream_;
    std::map<std::string, Buffer> buffers_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Shapes shapes_;  // that memory is there for
};

class EngineGraph : public Graph {
  public:
    EngineGraph(std::shared_ptr<const Library> library, std::unique_ptr<nvinfer1::ICudaEngine> engine, GraphSpec spec,
                Engine facts, std::string rebuild)
        : Graph(std::move(spec)),
          library_(std::move(library)),
          engine_(std::move(engine)),
          engine_facts_(std::move(facts)),
          rebuild_(std::move(rebuild)) {}

    Tensors run(const TensorRefs &inputs) const override {
        const std::shared_ptr<Bound> bound = bind_memory(inputs);
        for (const auto &[name, tensor] : inputs) bound->upload(name, *tensor);
        bound->launch();
        Tensors results;
        for (const TensorSpec &output : spec().outputs) {
            Tensor &result = results[output.name];
            result = {output.dtype, bound->shape_of(output.name.c_str()), {}};
            result.data.resize(bound->bytes(output.name));
            bound->download(output.name, result);
        }
        bound->wait();
        return results;
    }

    Call bind(const TensorRefs &inputs, const TensorRefs &outputs, std::size_t) const override {
        const std::shared_ptr<Bound> bound = bind_memory(inputs);
        for (const auto &[name, tensor] : inputs)
            if (!changes(name)) bound->upload(name, *tensor);
        return [bound, inputs, outputs] {
            for (const auto &[name, tensor] : inputs)
                if (changes(name)) bound->upload(name, *tensor);
            bound->launch();
            for (const auto &[name, tensor] : outputs) bound->download(name, *tensor);
            bound->wait();
        };
    }

    void check_shape(const std::string &input, const Shape &shape) const override {
        engine_facts_.check_shape(input, shape, rebuild_);
    }

  private:
    // Memory and a context for such inputs that nothing else uses meanwhile; those of an earlier call, if they are idle.
    std::shared_ptr<Bound> bind_memory(const TensorRefs &inputs) const {
        Shapes shapes;
        for (const TensorSpec &input : spec().inputs) {
            const Shape &shape = shapes[input.name] = inputs.at(input.name)->shape;
            check_shape(input.name, shape);
        }
        std::unique_ptr<Bound> bound = idle(shapes);
        if (bound->shapes() != shapes) bound->take(shapes);
        return {bound.release(), [this](Bound *done) {
                    std::unique_ptr<Bound> kept(done);
                    const std::lock_guard<std::mutex> lock(mutex_);
                    try {
                        idle_.push_back(std::move(kept));
                    } catch (const std::bad_alloc &) {  // then it goes
                    }
                }};
    }

    std::unique_ptr<Bound> idle(const Shapes &shapes) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return std::make_unique<Bound>(*library_, *engine_, engine_facts_);
        auto found = std::find_if(idle_.begin(), idle_.end(), [&](const auto &one) { return one->shapes() == shapes; });
        if (found == idle_.end()) --found;
        std::unique_ptr<Bound> bound = std::move(*found);
        idle_.erase(found);
        return bound;
    }

    std::shared_ptr<const Library> library_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    Engine engine_facts_;
    std::string rebuild_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Bound>> idle_;
};

#if LDM_TENSORRT_RTX
// Throws BackendError where TensorRT-RTX knows that an engine cannot run here, in its own words.
void check_validity(Library &library, std::string_view plan, const std::string &path, const std::string &rebuild) {
    using Reason = nvinfer1::EngineInvalidityDiagnostics;
    constexpr std::pair<Reason, const char *> reasons[] = {{Reason::kVERSION_MISMATCH, "version mismatch"},
                                                           {Reason::kUNSUPPORTED_CC, "unsupported cc"},
                                                           {Reason::kOLD_CUDA_DRIVER, "old cuda driver"},
                                                           {Reason::kOLD_CUDA_RUNTIME, "old cuda runtime"},
                                                           {Reason::kINSUFFICIENT_GPU_MEMORY, "insufficient gpu memory"},
                                                           {Reason::kMALFORMED_ENGINE, "malformed engine"},
                                                           {Reason::kCUDA_ERROR, "cuda error"}};
    library.log.clear();
    std::uint64_t bits = 0;
    const auto size = static_cast<std::int64_t>(plan.size());
    if (library.runtime->getEngineValidity(plan.data(), size, &bits) != nvinfer1::EngineValidity::kINVALID) return;
    std::vector<std::string> why;
    for (const auto &[reason, words] : reasons)
        if ((bits & static_cast<std::uint64_t>(reason)) != 0) why.push_back(words);
    if (const std::string last = library.log.last(); why.empty() && !last.empty()) why.push_back(last);
    throw BackendError(join(BUILT.library, " ", version(), " cannot run ", path, " here (",
                            listed(why, "it does not say why"), "). Update NVIDIA's driver, or run: ", rebuild));
}
#endif

std::vector<TensorSpec> specs_of(const nvinfer1::ICudaEngine &engine, nvinfer1::TensorIOMode mode) {
    std::vector<TensorSpec> specs;
    for (int32_t k = 0; k < engine.getNbIOTensors(); ++k) {
        const char *name = engine.getIOTensorName(k);
        if (engine.getTensorIOMode(name) != mode) continue;
        const Type *type = type_of(engine.getTensorDataType(name));
        const bool usable = type != nullptr && engine.getTensorLocation(name) == nvinfer1::TensorLocation::kDEVICE;
        TensorSpec spec{name, usable ? type->dtype : "another type, or on the host", {}};
        const nvinfer1::Dims dims = engine.getTensorShape(name);
        for (int32_t d = 0; d < dims.nbDims; ++d)
            spec.shape.push_back(dims.d[d] >= 0 ? Dimension{dims.d[d]} : Dimension{0, join(name, ".", d)});
        specs.push_back(std::move(spec));
    }
    return specs;
}

class OpenedEngines : public Engines {
  public:
    explicit OpenedEngines(const Bundle &bundle)
        : gpu_(first_gpu()), target_(fitting_engines(bundle, BUILT, version(), gpu_.compute_capability)),
          rebuild_(build_command(bundle, BUILT, gpu_.compute_capability, target_.document.precision)) {
        if (library_->runtime == nullptr) throw library_->failed("start");
    }

    std::string name() const override { return join(BUILT.library, " ", version(), " ", target_.document.kind, " ", gpu_.name); }
    const EngineTarget &target() const override { return target_; }

    std::unique_ptr<Graph> open(const std::string &graph, const GraphSpec &spec) const override {
        const auto found = target_.document.engines.find(graph);
        if (found == target_.document.engines.end()) {
            const std::string loop = is_loop(graph) ? " --loop " + graph.substr(graph.find('/') + 1) : "";
            throw BackendError(join(join(TARGETS, "/", target_.document.kind), " has no engine of ", graph, ". Run: ", rebuild_, loop));
        }
        Engine facts = found->second;
        const std::string file = facts.path;
        facts.path = join(TARGETS, "/", target_.document.kind, "/", facts.path);  // what errors call it
        std::unique_ptr<nvinfer1::ICudaEngine> engine;
        try {
            const Content plan = target_.files.content(file);
#if LDM_TENSORRT_RTX
            check_validity(*library_, plan.bytes(), facts.path, rebuild_);
#endif
            engine.reset(library_->runtime->deserializeCudaEngine(plan.bytes().data(), plan.bytes().size()));
        } catch (const BundleError &error) {
            throw BackendError(join(facts.path, " cannot be used, since ", error.what(), ". Run: ", rebuild_));
        }
        if (engine == nullptr) throw library_->failed("open " + facts.path);
        if (!agree(spec.inputs, specs_of(*engine, nvinfer1::TensorIOMode::kINPUT)) ||
            !agree(spec.outputs, specs_of(*engine, nvinfer1::TensorIOMode::kOUTPUT)))
            throw BackendError(join(facts.path, " has other inputs or outputs than ", spec.path, ". Run: ", rebuild_));
        return std::make_unique<EngineGraph>(library_, std::move(engine), spec, std::move(facts), rebuild_);
    }

  private:
    Gpu gpu_;
    EngineTarget target_;
    std::string rebuild_;
    std::shared_ptr<Library> library_ = std::make_shared<Library>();
};

}  // namespace

bool may_run_engines(const Bundle &bundle) { return !engine_targets(bundle, BUILT).empty() && driver_is_there(); }

std::unique_ptr<Engines> open_engines(const Bundle &bundle, const Flavour *flavour) {
    if (flavour != nullptr && flavour != &BUILT) throw not_built_with(*flavour);
    return std::make_unique<OpenedEngines>(bundle);
}

}  // namespace ldm::runtime
