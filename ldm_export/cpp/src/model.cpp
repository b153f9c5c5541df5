#include "model.hpp"

#include "contract.hpp"
#include "error.hpp"

#include <algorithm>
#include <set>

namespace ldm::runtime {

namespace {

// Row k of an array (B, ...).
Tensor row_of(const Tensor &tensor, std::size_t k, std::size_t batch) {
    const std::size_t bytes = tensor.data.size() / batch;
    Tensor row{tensor.dtype, {tensor.shape.begin() + 1, tensor.shape.end()}, {}};
    const auto from = tensor.data.begin() + static_cast<std::ptrdiff_t>(k * bytes);
    row.data.assign(from, from + static_cast<std::ptrdiff_t>(bytes));
    return row;
}

Device device_for(const std::string &backend) {
    if (flavour_of(backend) != nullptr) return Device::cpu;
    if (backend != "auto" && backend != "cpu" && backend != "cuda") {
        std::vector<std::string> there{"auto", "cpu", "cuda"};
        for (const Flavour &flavour : FLAVOURS) there.push_back(flavour.backend);
        throw InputError(join("There is no backend '", backend, "'; there are ", listed(there), ". Use one of those."));
    }
    if (backend == "cpu") return Device::cpu;
    if (OnnxRuntime::has_cuda()) return Device::cuda;
    if (backend == "cuda")
        throw BackendError(join("cuda was asked for; this ONNX Runtime ", OnnxRuntime::version(),
                                " has no CUDA provider. Use ONNX Runtime's release for GPUs."));
    return Device::cpu;
}

}  // namespace

Model::Model(const fs::path &folder, const std::string &backend, int threads, bool verify, Warn warn)
    : bundle_(Bundle::open(folder, verify)),
      facts_(facts_of(bundle_)),
      warn_(std::move(warn)),
      runtime_(threads),
      fixed_device_(backend != "auto"),
      device_(device_for(backend)) {
    const Flavour *flavour = flavour_of(backend);
    if (flavour != nullptr || (!fixed_device_ && may_run_engines(bundle_))) open_engines(flavour);
    if (engines_ == nullptr) open_target();
    if (!verify) return;
    tokenizers();
    for (const std::string &name : roles().graphs()) graph(name);
}

void Model::open_engines(const Flavour *asked) {
    try {
        engines_ = runtime::open_engines(bundle_, asked);
    } catch (const BackendError &error) {
        if (fixed_device_) throw;
        warn(join(error.what(), " Another backend is used."));
        return;
    }
    for (const auto &[name, engine] : engines_->target().document.engines)  // loops that the bundle has no graph of
        if (is_loop(name)) bundle_.manifest.graphs.emplace(name, GraphSpec{name + ".onnx", engine.inputs, engine.outputs});
}

void Model::open_target() {
    if (device_ == Device::cuda) return;
    try {
        target_ = read_target(bundle_, OnnxRuntime::version());
    } catch (const PassedOver &why) {
        pass_over_target(why.what());
    }
}

void Model::pass_over_target(const std::string &why) {
    target_.reset();
    warn(join("targets/", ORT_CPU, " of ", bundle_.path().string(), " is passed over, since ", why,
              "; the plain graphs run. For its speed run: ldm-export build ", bundle_.path().string(), " --target cpu"));
}

std::string Model::backend() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (engines_ != nullptr) return engines_->name();
    const char *target = target_ ? " ort-cpu" : "";
    return join("onnxruntime ", OnnxRuntime::version(), device_ == Device::cuda ? " cuda" : " cpu", target);
}

const Graph &Model::graph(const std::string &name) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    std::unique_ptr<Graph> &graph = graphs_[name];
    if (graph == nullptr) graph = load(name);
    return *graph;
}

std::unique_ptr<Graph> Model::load(const std::string &name) {
    const GraphSpec &graph = spec(name);
    if (engines_ != nullptr) {
        try {
            return engines_->open(name, graph);
        } catch (const BackendError &error) {
            if (fixed_device_ || is_loop(name)) throw;
            engines_.reset();
            warn(join(error.what(), " Another backend is used."));
            open_target();
        }
    }
    if (target_ && target_->graphs.count(name) != 0) {
        try {
            return load_target(*target_, name);
        } catch (const BundleError &) {
            pass_over_target("ONNX Runtime refuses its " + name + ", or it is another graph");
        }
    }
    return open(bundle_.files, graph.path, &graph);
}

std::unique_ptr<Graph> Model::open(const ListedFiles &files, const std::string &path, const GraphSpec *spec) {
    const GraphFiles found = files.graph(path);
    std::unique_ptr<Graph> graph;
    try {
        graph = runtime_.open(found, path, spec, device_);
    } catch (const BackendError &) {
        if (fixed_device_ || device_ == Device::cpu) throw;
        device_ = Device::cpu;
        warn("ONNX Runtime's CUDA provider does not start here; the CPU is used instead.");
        graph = runtime_.open(found, path, spec, device_);
    }
    watched_.insert(watched_.end(), found.watched.begin(), found.watched.end());
    return graph;
}

void Model::check_unchanged() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (const Watched &watched : watched_)
        if (const std::optional<Identity> now = identity_of(watched.file); !now || !(*now == watched.identity))
            throw BundleError(join(watched.file.string(), " has changed since the bundle was opened. Open the bundle anew."));
}

const Graph &Model::adapted_graph(const std::string &name) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    std::unique_ptr<Graph> &graph = adapted_[name];
    if (graph == nullptr) graph = load_adapted(name);
    return *graph;
}

std::unique_ptr<Graph> Model::load_adapted(const std::string &name) {
    if (engines_ != nullptr)
        throw InputError(join("Adapters were given, and ", backend(), " takes none when it draws. Use the backend cpu (ONNX "
                              "Runtime), or merge them: ldm-export export CHECKPOINT -o BUNDLE --lora ADAPTER.safetensors"));
    const std::string bundle = bundle_.path().string(), run = join("Run: ldm-export lora ", bundle, " ADAPTER.safetensors -o ADAPTER.ldma");
    std::optional<Target> plain;
    try {
        plain = read_adapters(bundle_);
    } catch (const PassedOver &why) {
        throw InputError(join(bundle, " takes no adapters of ", name, ", since ", why.what(), ". ", run));
    }
    if (!plain || plain->graphs.count(name) == 0) throw InputError(join(bundle, " takes no adapters of ", name, ". ", run));
    if (target_) {
        std::string why = "there is none of this graph";
        try {
            const std::optional<Target> fast = read_adapters_ort_cpu(bundle_, *plain, OnnxRuntime::version());
            if (fast && fast->graphs.count(name) != 0) return load_target(*fast, name);
        } catch (const PassedOver &passed) {
            why = passed.what();
        } catch (const BundleError &) {
            why = "ONNX Runtime refuses its " + name + ", or it is another graph";
        }
        warn(join("targets/", ADAPTERS_ORT_CPU, " of ", bundle, " is passed over, since ", why, "; the plain graph with branches "
                  "runs. For its speed run: ldm-export build ", bundle, " --target cpu"));
    }
    return load_target(*plain, name);
}

// A graph of a target; where that has branches for adapters, their inputs are in its spec.
std::unique_ptr<Graph> Model::load_target(const Target &target, const std::string &name) {
    const TargetGraph &graph = target.graphs.at(name);
    const auto part = [&](const std::string &path) { return open(target.files, path, nullptr); };
    std::unique_ptr<Graph> whole = part(graph.path);
    GraphSpec own = spec(name);
    for (const TensorSpec &input : whole->spec().inputs)
        if (is_branch_input(input.name)) own.inputs.push_back(input);
    if (graph.hoisted.empty() && graph.shallow.empty()) {
        if (agree(own.inputs, whole->spec().inputs) && agree(own.outputs, whole->spec().outputs)) return whole;
        throw BundleError(graph.path + " has other inputs or outputs than manifest.json says. Export the bundle anew.");
    }
    HoistedGraph::Parts parts;
    for (const auto &[input, path] : graph.hoisted) parts.emplace(input, part(path));
    return std::make_unique<HoistedGraph>(std::move(own), std::move(whole), std::move(parts),
                                       graph.shallow.empty() ? nullptr : part(graph.shallow), graph.deep_channels);
}

const Tokenizers &Model::tokenizers() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (!tokenizers_) {
        const auto read_below = [this](const std::string &folder) {
            return [this, folder](const std::string &name) {
                const std::string path = folder + name;
                return bundle_.files.has(path) ? std::optional<std::string>(bundle_.files.text(path)) : std::nullopt;
            };
        };
        Tokenizers found;
        for (const TextEncoder &encoder : roles().text_encoders) {
            const TokenizerFiles files{join(bundle_.path().string(), "/", encoder.tokenizer),
                                       read_below(encoder.tokenizer + "/")};
            found.push_back(open_tokenizer(encoder.kind, files));
            const Tokenizer &tokenizer = *found.back();
            if (const auto length = static_cast<std::int64_t>(tokenizer.max_length()); length != encoder.length)
                files.bad(tokenizer.length_file(), join("gives ", length, " tokens, and ", spec(encoder.graph).path, " reads ",
                                                        encoder.length));
        }
        tokenizers_ = std::move(found);
    }
    return *tokenizers_;
}

std::vector<std::vector<TokenRow>> Model::read(const std::string &prompt, const Reading &reading) {
    std::vector<std::vector<TokenRow>> by_encoder;
    std::size_t count = 0;
    for (const auto &tokenizer : tokenizers()) {
        by_encoder.push_back(token_rows(*tokenizer, prompt, reading, warn_));
        count = std::max(count, by_encoder.back().size());
    }
    std::vector<std::vector<TokenRow>> chunks(count);
    for (std::size_t i = 0; i < by_encoder.size(); ++i)
        for (std::size_t k = 0; k < count; ++k)
            chunks[k].push_back(k < by_encoder[i].size() ? by_encoder[i][k]
                                                         : token_rows(*tokenizers()[i], "", Reading{}, warn_)[0]);
    return chunks;
}

std::vector<SharedTensors> Model::encode(const std::vector<std::vector<TokenRow>> &chunks,
                                         const std::vector<Mixture> &mixtures) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const std::size_t encoders = roles().text_encoders.size();
    std::vector<std::string> keys;
    std::map<std::string, SharedTensors> rows;
    struct Missing {  // what is not known yet, of one mixture
        Mixture mixture;
        std::vector<std::string> keys;
        std::vector<std::vector<Tensor>> ids;  // by encoder and row
    };
    std::map<std::string, Missing> missing;
    for (std::size_t number = 0; number < chunks.size(); ++number) {
        const std::vector<TokenRow> &chunk = chunks[number];
        std::vector<Tensor> ids;
        std::string key;
        for (const TokenRow &row : chunk) {
            ids.push_back(Tensor::zeros<TokenId>({static_cast<std::int64_t>(row.ids.size())}));
            std::copy(row.ids.begin(), row.ids.end(), ids.back().as<TokenId>());
            key.append(ids.back().as<char>(), ids.back().data.size());
        }
        Mixture mixture;  // of what changes an encoder
        std::string mixed;
        for (const auto &[adapter, strength] : mixtures[number])
            for (const TextEncoder &encoder : roles().text_encoders)
                if (adapter->factors.count(encoder.graph) != 0) {
                    mixture.emplace_back(adapter, strength);
                    mixed += join('\0', adapter->key, '\0').append(reinterpret_cast<const char *>(&strength), sizeof strength);
                    break;
                }
        key += mixed;
        keys.push_back(key);
        if (rows.count(key) != 0) continue;
        const SharedTensors *known = prompts_.find(key);
        rows[key] = known == nullptr ? nullptr : *known;
        if (known != nullptr) continue;
        Missing &group = missing[mixed];
        group.mixture = std::move(mixture);
        group.keys.push_back(key);
        group.ids.resize(encoders);
        for (std::size_t i = 0; i < encoders; ++i) group.ids[i].push_back(std::move(ids[i]));
    }
    for (const auto &[_, group] : missing) {  // a run each, so that no row depends on another picture's adapters
        std::vector<Tensors> made = run_encoders(group.ids, group.mixture);
        for (std::size_t k = 0; k < group.keys.size(); ++k) {
            rows[group.keys[k]] = std::make_shared<const Tensors>(std::move(made[k]));
            prompts_.insert(group.keys[k], rows[group.keys[k]]);
        }
    }
    std::vector<SharedTensors> encoded;
    for (std::size_t k = 0; k < keys.size(); ++k) encoded.push_back(weighted(rows.at(keys[k]), chunks[k]));
    return encoded;
}

// The states of a chunk with its weights; what is pooled as it is.
SharedTensors Model::weighted(const SharedTensors &found, const std::vector<TokenRow> &chunk) const {
    if (std::all_of(chunk.begin(), chunk.end(), [](const TokenRow &row) { return row.weights.empty(); })) return found;
    Tensors made = *found;
    for (auto &[source, tensor] : made)
        for (std::size_t i = 0; i < chunk.size(); ++i) {
            const std::string start = roles().text_encoders[i].graph + ".";
            const bool is_own = source.compare(0, start.size(), start) == 0;
            if (is_own && tensor.shape.size() == 2 && !chunk[i].weights.empty()) weigh(tensor, chunk[i].weights);
        }
    return std::make_shared<const Tensors>(std::move(made));
}

// One run of each text encoder on the ids of all prompts under one mixture; ids by encoder and prompt.
std::vector<Tensors> Model::run_encoders(const std::vector<std::vector<Tensor>> &ids, const Mixture &mixture) {
    const std::size_t batch = ids.at(0).size();
    const std::vector<Mixture> mixtures(batch, mixture);
    const std::set<std::string> read = roles().sources(bundle_.manifest.graphs);
    std::vector<Tensors> rows(batch);
    for (std::size_t i = 0; i < ids.size(); ++i) {
        const std::int64_t length = ids[i][0].shape[0];
        Tensor all = Tensor::zeros<TokenId>({static_cast<std::int64_t>(batch), length});
        for (std::size_t k = 0; k < batch; ++k)
            std::copy_n(ids[i][k].as<TokenId>(), length, all.as<TokenId>() + static_cast<std::int64_t>(k) * length);
        const std::string &encoder = roles().text_encoders[i].graph;
        const bool adapted = changes(mixtures, encoder);
        const Graph &reads = adapted ? adapted_graph(encoder) : graph(encoder);
        Tensors branches = adapted ? branch_arrays(reads.spec(), encoder, mixtures) : Tensors{};
        TensorRefs given{{"input_ids", &all}};
        for (auto &[name, tensor] : branches) given.emplace(name, &tensor);
        const Tensors outputs = reads.run(given);
        for (const TensorSpec &wanted : spec(encoder).outputs) {
            const std::string source = join(encoder, ".", wanted.name);
            if (read.count(source) == 0) continue;
            const auto found = outputs.find(wanted.name);
            const Tensor made = found == outputs.end() ? Tensor{} : found->second;
            bool fits = made.dtype == wanted.dtype && made.shape.size() == wanted.shape.size() && !made.shape.empty() &&
                        static_cast<std::size_t>(made.shape[0]) == batch;
            for (std::size_t axis = 1; fits && axis < made.shape.size(); ++axis)
                fits = wanted.shape[axis].is_free() || made.shape[axis] == wanted.shape[axis].size;
            if (!fits) throw BundleError(join("The ", encoder, " gives no '", wanted.name, "' as it must. Export the bundle anew."));
            for (std::size_t k = 0; k < batch; ++k) rows[k][source] = row_of(made, k, batch);
        }
    }
    return rows;
}

}  // namespace ldm::runtime
