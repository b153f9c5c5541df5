#include "graph.hpp"

#include "error.hpp"

#include <algorithm>

namespace ldm::runtime {

namespace {

constexpr const char *DEEP = "deep";

// Of `given`, what a graph takes.
TensorRefs taken(const TensorRefs &given, const Graph &graph) {
    TensorRefs refs;
    for (const TensorSpec &tensor : graph.spec().inputs) refs.emplace(tensor.name, given.at(tensor.name));
    return refs;
}

// Whether two tensors have the same type and rank, and the same sizes where both are fixed.
bool alike(const TensorSpec &one, const TensorSpec &other) {
    if (one.dtype != other.dtype || one.shape.size() != other.shape.size()) return false;
    for (std::size_t k = 0; k < one.shape.size(); ++k)
        if (!one.shape[k].is_free() && !other.shape[k].is_free() && one.shape[k].size != other.shape[k].size) return false;
    return true;
}

using Specs = std::map<std::string, const TensorSpec *>;

Specs by_name(const std::vector<TensorSpec> &tensors) {
    Specs specs;
    for (const TensorSpec &tensor : tensors) specs.emplace(tensor.name, &tensor);
    return specs;
}

bool all_given(const std::vector<TensorSpec> &wanted, const Specs &given) {
    return std::all_of(wanted.begin(), wanted.end(), [&](const TensorSpec &tensor) {
        const auto found = given.find(tensor.name);
        return found != given.end() && alike(tensor, *found->second);
    });
}

// Copy where the values lie, since a bound call reads them there.
void overwrite(Tensor &tensor, const Tensor &values) {
    if (tensor.data.size() != values.data.size())
        throw BundleError("A part of the target gives another size from call to call. Build the target anew.");
    std::copy(values.data.begin(), values.data.end(), tensor.data.begin());
}

}  // namespace

Tensor expected(Tensors outputs, const GraphSpec &graph, const std::string &name, const char *dtype, const Shape &shape) {
    const auto found = outputs.find(name);
    if (found == outputs.end() || found->second.dtype != dtype || found->second.shape != shape)
        throw BundleError(join(graph.path, " gives no '", name, "' of the size that it must. Export the bundle anew."));
    return std::move(found->second);
}

HoistedGraph::HoistedGraph(GraphSpec spec, std::unique_ptr<Graph> rest, Parts parts, std::unique_ptr<Graph> shallow,
                     std::int64_t deep_channels)
    : Graph(std::move(spec)),
      rest_(std::move(rest)),
      parts_(std::move(parts)),
      shallow_(std::move(shallow)),
      deep_channels_(deep_channels) {
    check_parts();
}

void HoistedGraph::check_parts() const {
    Specs given = by_name(spec().inputs);
    bool fits = true;
    for (const auto &[name, part] : parts_) {
        const std::vector<TensorSpec> &inputs = part->spec().inputs;
        fits = fits && inputs.size() == 1 && inputs[0].name == name && all_given(inputs, given);
    }
    for (const auto &[name, part] : parts_)
        for (const TensorSpec &tensor : part->spec().outputs) given[tensor.name] = &tensor;
    const Specs made = by_name(rest_->spec().outputs);
    fits = fits && all_given(rest_->spec().inputs, given) && all_given(spec().outputs, made);
    fits = fits && made.size() == spec().outputs.size() + (shallow_ ? 1 : 0);
    const auto deep = made.find(DEEP);
    fits = fits && (deep != made.end()) == can_skip() && (deep_channels_ > 0) == can_skip();
    if (fits && shallow_) {
        given[DEEP] = deep->second;
        const std::vector<Dimension> &sizes = deep->second->shape;
        fits = sizes.size() == 4 && !sizes[1].is_free() && sizes[1].size == deep_channels_ &&
               all_given(shallow_->spec().inputs, given) &&
               all_given(spec().outputs, by_name(shallow_->spec().outputs));
    }
    if (!fits)
        throw BundleError(join(rest_->spec().path, " and what belongs to it are not ", spec().path,
                               ". Build the target anew."));
}

Tensors HoistedGraph::run(const TensorRefs &inputs) const {
    TensorRefs given = inputs;
    std::vector<Tensors> held;
    for (const auto &[name, _] : parts_) held.push_back(results(name, *inputs.at(name)));
    for (Tensors &tensors : held)
        for (auto &[name, tensor] : tensors) given[name] = &tensor;
    return rest_->run(taken(given, *rest_));
}

Call HoistedGraph::bind(const TensorRefs &inputs, const TensorRefs &outputs, std::size_t every) const {
    struct Bound {
        std::map<std::string, Tensors> held;  // what the parts give, by part
        Tensor deep;
        Call whole, shallow;
        std::size_t turn = 0;
    };
    const auto bound = std::make_shared<Bound>();
    TensorRefs given = inputs;
    std::vector<std::pair<std::string, Tensor *>> changing;  // inputs of other values from call to call
    for (const auto &[name, _] : parts_) {
        Tensors &held = bound->held[name] = results(name, *inputs.at(name));
        for (auto &[output, tensor] : held) given[output] = &tensor;
        if (changes(name)) changing.emplace_back(name, inputs.at(name));
    }
    TensorRefs made = outputs;
    if (every > 1) {
        const Shape &sample = inputs.at("sample")->shape;
        bound->deep = Tensor::zeros<float>({sample[0], deep_channels_, sample[2], sample[3]});
        given[DEEP] = made[DEEP] = &bound->deep;
    }
    bound->whole = rest_->bind(taken(given, *rest_), made);
    if (every > 1) bound->shallow = shallow_->bind(taken(given, *shallow_), outputs);
    return [this, bound, changing, every] {
        for (const auto &[name, value] : changing) {
            const Tensors now = results(name, *value);
            for (auto &[output, tensor] : bound->held[name]) overwrite(tensor, now.at(output));
        }
        (bound->turn++ % every == 0 ? bound->whole : bound->shallow)();
    };
}

// What the part that depends on an input gives for a value; where each row is one number, such as its timestep, what it
// gave for that number is remembered.
Tensors HoistedGraph::results(const std::string &part, Tensor &value) const {
    if (value.shape.size() != 1) return parts_.at(part)->run({{part, &value}});
    Tensors whole;
    for (std::size_t number = 0; number < value.count(); ++number) {
        const SharedTensors held = row(part, value, number);  // which another thread may drop from the cache
        for (const auto &[name, one] : *held) {
            if (one.shape.empty() || one.shape[0] != 1)
                throw BundleError("A part of the target gives other than a row for a row. Build the target anew.");
            const auto [found, is_first] = whole.emplace(name, one);
            if (is_first) continue;
            found->second.data.insert(found->second.data.end(), one.data.begin(), one.data.end());
            ++found->second.shape[0];
        }
    }
    return whole;
}

SharedTensors HoistedGraph::row(const std::string &part, const Tensor &value, std::size_t number) const {
    Tensor one{value.dtype, {1}, {}};
    const auto bytes = static_cast<std::ptrdiff_t>(value.data.size() / value.count());
    const auto from = value.data.begin() + bytes * static_cast<std::ptrdiff_t>(number);
    one.data.assign(from, from + bytes);
    const std::string key = part + '\0' + std::string(one.as<char>(), one.data.size());
    {
        const std::lock_guard<std::mutex> lock(known_->mutex);
        if (const SharedTensors *found = known_->results.find(key)) return *found;
    }
    SharedTensors made = std::make_shared<const Tensors>(parts_.at(part)->run({{part, &one}}));
    const std::lock_guard<std::mutex> lock(known_->mutex);
    known_->results.insert(key, made);
    return made;
}

}  // namespace ldm::runtime
