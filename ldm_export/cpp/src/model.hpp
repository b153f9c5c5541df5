// An opened bundle: what pipelines on the same weights share. Any thread may use it.
#pragma once

#include "adapters.hpp"
#include "bundle.hpp"
#include "facts.hpp"
#include "graph.hpp"
#include "prompts.hpp"
#include "session.hpp"
#include "target.hpp"
#include "tensorrt.hpp"
#include "tokenizer.hpp"

#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ldm::runtime {

using Tokenizers = std::vector<std::unique_ptr<const Tokenizer>>;

class Model {
  public:
    // backend: as in ldm_open_options. Throws BundleError, BackendError, InputError.
    Model(const fs::path &folder, const std::string &backend, int threads, bool verify, Warn warn);

    const Bundle &bundle() const { return bundle_; }
    const Facts &facts() const { return facts_; }
    const Roles &roles() const { return *bundle_.manifest.roles; }
    const GraphSpec &spec(const std::string &graph) const { return bundle_.manifest.graphs.at(graph); }
    bool has(const std::string &graph) const { return bundle_.manifest.graphs.count(graph) != 0; }
    void warn(const std::string &sentence) const { warn_(sentence); }
    std::string backend() const;  // what really runs, such as "onnxruntime 1.32.0 cpu ort-cpu"

    const Graph &graph(const std::string &name);  // opened when it is first asked for, or, to be verified, with the model

    // The same with branches for adapters, whose inputs its spec has too. Throws InputError where there is none.
    const Graph &adapted_graph(const std::string &name);

    // Throws BundleError where a file changed that an opened graph has its weights in: reading it could end the process.
    void check_unchanged() const;
    const Tokenizers &tokenizers();   // one for each text encoder

    // The chunks of a prompt, each a row of ids for each text encoder; one chunk unless long ones are read so.
    std::vector<std::vector<TokenRow>> read(const std::string &prompt, const Reading &reading);

    // What the text encoders give for such chunks, each with its picture's adapters, without the batch, by source, weighted;
    // of what is read.
    std::vector<SharedTensors> encode(const std::vector<std::vector<TokenRow>> &chunks, const std::vector<Mixture> &mixtures);

  private:
    void open_engines(const Flavour *asked);
    void open_target();
    std::unique_ptr<Graph> load(const std::string &name);
    std::unique_ptr<Graph> load_adapted(const std::string &name);
    std::unique_ptr<Graph> load_target(const Target &target, const std::string &name);
    std::unique_ptr<Graph> open(const ListedFiles &files, const std::string &path, const GraphSpec *spec);
    void pass_over_target(const std::string &why);
    SharedTensors weighted(const SharedTensors &found, const std::vector<TokenRow> &chunk) const;
    std::vector<Tensors> run_encoders(const std::vector<std::vector<Tensor>> &ids, const Mixture &mixture);

    Bundle bundle_;
    Facts facts_;
    Warn warn_;
    OnnxRuntime runtime_;
    bool fixed_device_;  // asked for by name
    Device device_;
    std::unique_ptr<Engines> engines_;
    std::optional<Target> target_;
    mutable std::recursive_mutex mutex_;  // of what follows, and of device_, engines_ and target_
    std::map<std::string, std::unique_ptr<Graph>> graphs_, adapted_;
    std::vector<Watched> watched_;
    std::optional<Tokenizers> tokenizers_;
    Cache<std::string, SharedTensors> prompts_{256};  // by token ids and what adapters change the encoders
};

}  // namespace ldm::runtime
