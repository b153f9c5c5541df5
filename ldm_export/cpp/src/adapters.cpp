#include "adapters.hpp"

#include "cache.hpp"
#include "error.hpp"
#include "repr.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <system_error>

namespace ldm::runtime {

namespace {

constexpr const char *FORMAT = "ldm_export adapter 1";
constexpr const char *HOW_TO_MAKE = "Make it with: ldm-export lora BUNDLE ADAPTER.safetensors -o ADAPTER.ldma";
constexpr const char *BRANCH = "lora.", *DOWN = ".down", *UP = ".up", *SCALE = ".scale", *GAIN = ".gain";
constexpr const char *MAGNITUDE = ".magnitude", *NORMS = ".norms";
constexpr std::uint64_t MOST_HEADER_BYTES = 16 << 20;
constexpr double LARGEST_STRENGTH = 1000;
constexpr std::size_t REMEMBERED = 16;  // files that are kept in memory after they were read

bool ends_with(const std::string &text, const std::string &end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Linear layers have factors of two axes, convolutions of four; this is the axis of the rank, in `up` the other one.
std::size_t rank_axis_of_down(const Shape &down) { return down.size() == 2 ? 1 : 0; }
std::size_t rank_axis_of_up(const Shape &up) { return up.size() == 2 ? 0 : 1; }

bool go_together(const LayerFactors &factors) {
    const Shape &down = factors.down.shape, &up = factors.up.shape;
    if (down.size() != up.size() || (down.size() != 2 && down.size() != 4) || factors.rank() != up[rank_axis_of_up(up)])
        return false;
    if (factors.rank() < 1 || factors.magnitude.has_value() != factors.norms.has_value()) return false;
    const std::int64_t out = up[1 - rank_axis_of_up(up)];
    return !factors.magnitude || (factors.magnitude->shape == Shape{out} && factors.norms->shape == Shape{3, out});
}

Tensor tensor_from(const std::string &name, const Json &entry, std::string_view data) {
    const MalformedError wrong("'" + name + "' is not float32 of the size that it says");
    check_kind(entry, Kind::object, "'" + name + "'");
    Tensor found{"float32", {}, {}};
    std::vector<std::int64_t> ends;
    for (const auto &[key, to] : {std::make_pair("shape", &found.shape), std::make_pair("data_offsets", &ends)})
        for (const Json &size : field(entry, key, Kind::array, name).array()) {
            check_kind(size, Kind::integer, key);
            if (size.integer() < 0) throw wrong;
            to->push_back(size.integer());
        }
    if (field(entry, "dtype", Kind::text, name).text() != "F32" || ends.size() != 2 || ends[1] < ends[0]) throw wrong;
    const auto bytes = static_cast<std::size_t>(ends[1] - ends[0]);
    const bool possible = std::all_of(found.shape.begin(), found.shape.end(), [&](std::int64_t size) {
        return static_cast<std::size_t>(size) <= data.size();  // more than could be held is none of ours
    });
    if (static_cast<std::size_t>(ends[1]) > data.size() || found.shape.size() > 4 || !possible) throw wrong;
    std::size_t count = 1;
    for (const std::int64_t size : found.shape) {
        count *= static_cast<std::size_t>(size);
        if (count > data.size()) throw wrong;
    }
    if (count * sizeof(float) != bytes) throw wrong;
    found.data.resize(bytes);
    if (bytes != 0) std::memcpy(found.data.data(), data.data() + ends[0], bytes);
    const float *values = found.as<float>();
    if (!std::all_of(values, values + found.count(), [](float value) { return std::isfinite(value); }))
        throw MalformedError("'" + name + "' holds NaN or infinity");
    return found;
}

Adapter adapter_from(std::string_view content) {
    std::uint64_t length = 0;
    if (content.size() >= 8)
        for (int k = 7; k >= 0; --k) length = length << 8 | static_cast<unsigned char>(content[static_cast<std::size_t>(k)]);
    if (length < 2 || length > MOST_HEADER_BYTES || length > content.size() - 8)
        throw MalformedError("it is cut short, or not in the form of safetensors");
    const Json header = parsed(content.substr(8, length), Repeats::refused);
    const Json &metadata = field(header, "__metadata__", Kind::object);
    if (!metadata["format"].is(Kind::text) || metadata["format"].text() != FORMAT)
        throw MalformedError(join("its format is ", short_repr(metadata["format"]), "; '", FORMAT, "' is read"));
    const Json networks = parsed(field(metadata, "networks", Kind::text).text(), Repeats::refused);
    Adapter adapter{{}, {}, texts_of(Json(Json::Object{{"networks", networks}}), "networks"), {}};
    std::map<std::string, Tensor> arrays;
    for (const auto &[name, entry] : header.object())
        if (name != "__metadata__") arrays.emplace(name, tensor_from(name, entry, content.substr(8 + length)));
    for (const auto &[name, tensor] : arrays) {
        const std::size_t slash = std::min(name.find('/'), name.size()), dot = std::min(name.rfind('.'), name.size());
        const std::string graph = name.substr(0, slash), role = name.substr(dot);
        const bool known = role == DOWN || role == UP || role == MAGNITUDE || role == NORMS;
        if (adapter.networks.count(graph) == 0 || slash >= dot || !known)
            throw MalformedError("it has '" + name + "', which is nothing of a graph that it names");
        if (role != DOWN) continue;
        const std::string key = name.substr(0, dot), layer = name.substr(slash + 1, dot - slash - 1);
        const auto part = [&](const char *of) {
            const auto found = arrays.find(key + of);
            return found == arrays.end() ? std::nullopt : std::optional<Tensor>(found->second);
        };
        const std::optional<Tensor> up = part(UP);
        if (!up) throw MalformedError("it has no whole factors of " + layer);
        const LayerFactors factors{tensor, *up, part(MAGNITUDE), part(NORMS)};
        if (!go_together(factors)) throw MalformedError("what it has of " + layer + " does not go together");
        adapter.factors[graph].emplace(layer, factors);
    }
    std::size_t used = 0;
    for (const auto &[_, factors] : adapter.factors)
        for (const auto &[__, own] : factors) used += 2 + (own.magnitude ? 1 : 0) + (own.norms ? 1 : 0);
    if (used != arrays.size()) throw MalformedError("it has parts of a layer without the others");
    if (adapter.networks.empty() || adapter.factors.size() != adapter.networks.size()) throw MalformedError("it has nothing of a graph that it names");
    return adapter;
}

std::string whole(const fs::path &path) {
    std::error_code failed;
    if (!fs::is_regular_file(path, failed)) {
        const std::string why = failed ? failed.message() : fs::exists(path) ? "no regular file" : "no such file";
        throw InputError(join("The adapter ", path.string(), " cannot be read (", why, "). ", HOW_TO_MAKE));
    }
    std::ifstream stream(path, std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    if (!stream.good() && !stream.eof())
        throw InputError(join("The adapter ", path.string(), " cannot be read. ", HOW_TO_MAKE));
    return content;
}

// A file's adapter; one that was read a moment ago and is as it was is not read again.
std::shared_ptr<const Adapter> opened(const fs::path &path) {
    static std::mutex mutex;
    static Cache<std::string, std::shared_ptr<const Adapter>> known(REMEMBERED);
    std::string key = path.string();
    if (const std::optional<Identity> now = identity_of(path))
        key = join(key, '\0', now->device, ' ', now->inode, ' ', now->size, ' ', now->seconds, ' ', now->nanoseconds);
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto *found = known.find(key)) return *found;
    try {
        Adapter adapter = adapter_from(whole(path));
        adapter.path = path;
        adapter.key = key;
        const auto made = std::make_shared<const Adapter>(std::move(adapter));
        known.insert(key, made);
        return made;
    } catch (const MalformedError &error) {
        throw InputError(join(path.string(), " is no adapter for bundles (", error.what(), "). ", HOW_TO_MAKE));
    }
}

void check_fits(const Adapter &adapter, const Bundle &bundle) {
    for (const auto &[graph, sha256] : adapter.networks)
        if (const auto found = bundle.manifest.networks.find(graph); found == bundle.manifest.networks.end() || found->second != sha256)
            throw InputError(join(adapter.path.string(), " was made for another ", graph, " than that of ",
                                  bundle.path().string(), ". Make it for this bundle: ldm-export lora ",
                                  bundle.path().string(), " ADAPTER.safetensors -o ", adapter.path.string()));
}

// Whether a factor has so many axes, of the sizes of the last ones that a branch takes.
bool fits(const Tensor &factor, const std::vector<Dimension> &shape, std::size_t axes) {
    if (factor.shape.size() != axes || shape.size() < axes) return false;
    const std::size_t skipped = shape.size() - axes;
    for (std::size_t k = 0; k < axes; ++k)
        if (const Dimension &size = shape[skipped + k]; !size.is_free() && size.size != factor.shape[k]) return false;
    return true;
}

Tensor zeros(const TensorSpec &spec) {
    Shape shape;
    for (const Dimension &size : spec.shape) shape.push_back(size.is_free() ? 1 : size.size);
    return Tensor::zeros<float>(shape);
}

// Tensors side by side along an axis.
Tensor joined(const std::vector<const Tensor *> &parts, std::size_t axis) {
    if (parts.size() == 1) return *parts[0];
    Shape shape = parts[0]->shape;
    shape[axis] = 0;
    for (const Tensor *part : parts) shape[axis] += part->shape[axis];
    Tensor whole = Tensor::zeros<float>(shape);
    std::size_t rows = 1;
    for (std::size_t k = 0; k < axis; ++k) rows *= static_cast<std::size_t>(shape[k]);
    float *out = whole.as<float>();
    for (std::size_t row = 0; row < rows; ++row)
        for (const Tensor *part : parts) {
            const std::size_t each = part->count() / rows;
            out = std::copy_n(part->as<float>() + row * each, each, out);
        }
    return whole;
}

// What one row has of a layer: factors and their strengths.
using Uses = std::vector<std::pair<const LayerFactors *, double>>;

Uses uses_of(const Mixture &row, const std::string &graph, const std::string &layer) {
    Uses found;
    for (const auto &[adapter, strength] : row) {
        const auto factors = adapter->factors.find(graph);
        if (factors == adapter->factors.end()) continue;
        const auto own = factors->second.find(layer);
        if (own != factors->second.end()) found.emplace_back(&own->second, strength);
    }
    return found;
}

// Factors of each row, (rows, ..., in, rank) and (rows, ..., rank, out), with zeros up to the highest rank; of one row for all
// where all have the same.
std::pair<Tensor, Tensor> by_row(const TensorSpec &down, const TensorSpec &up, const std::vector<Uses> &rows) {
    const bool same = std::all_of(rows.begin(), rows.end(), [&](const Uses &row) { return row == rows[0]; });
    const std::size_t count = same ? 1 : rows.size();
    std::int64_t highest = 1;
    for (std::size_t k = 0; k < count; ++k) {
        std::int64_t rank = 0;
        for (const auto &[factors, _] : rows[k]) rank += factors->rank();
        highest = std::max(highest, rank);
    }
    Shape first(down.shape.size(), 1), second(up.shape.size(), 1);
    first[0] = second[0] = static_cast<std::int64_t>(count);
    const std::int64_t in = first[first.size() - 2] = down.shape[down.shape.size() - 2].size;
    const std::int64_t out = second.back() = up.shape.back().size;
    first.back() = second[second.size() - 2] = highest;
    std::pair<Tensor, Tensor> made{Tensor::zeros<float>(first), Tensor::zeros<float>(second)};
    for (std::size_t k = 0; k < count; ++k) {
        const auto number = static_cast<std::int64_t>(k);
        std::int64_t at = 0;
        for (const auto &[factors, strength] : rows[k]) {
            const std::int64_t rank = factors->rank();
            for (std::int64_t row = 0; row < in; ++row)
                for (std::int64_t r = 0; r < rank; ++r)
                    made.first.as<float>()[(number * in + row) * highest + at + r] =
                        factors->down.as<float>()[row * rank + r] * static_cast<float>(strength);
            std::copy_n(factors->up.as<float>(), rank * out, made.second.as<float>() + (number * highest + at) * out);
            at += rank;
        }
    }
    return made;
}

// Factors of all rows' adapters along the rank, and each row's strengths for its own, 0 for the others.
struct Beside {
    Tensor down, up, scale;
};

Beside side_by_side(const TensorSpec &down, const TensorSpec &up, const TensorSpec &scale, const std::vector<Uses> &rows) {
    std::vector<const LayerFactors *> all;  // each once, in the order in which rows name them
    for (const Uses &row : rows)
        for (const auto &[factors, _] : row)
            if (std::find(all.begin(), all.end(), factors) == all.end()) all.push_back(factors);
    const LayerFactors none{zeros(down), zeros(up), {}, {}};
    if (all.empty()) all.push_back(&none);
    std::vector<const Tensor *> downs, ups;
    std::int64_t rank = 0;
    for (const LayerFactors *factors : all) {
        downs.push_back(&factors->down);
        ups.push_back(&factors->up);
        rank += factors->rank();
    }
    Shape shape(scale.shape.size(), 1);
    shape[0] = static_cast<std::int64_t>(rows.size());
    shape[1] = rank;
    Beside made{joined(downs, rank_axis_of_down(downs[0]->shape)), joined(ups, rank_axis_of_up(ups[0]->shape)),
                Tensor::zeros<float>(shape)};
    float *strengths = made.scale.as<float>();
    for (const Uses &row : rows)
        for (const LayerFactors *factors : all) {
            const auto own = std::find_if(row.begin(), row.end(), [&](const auto &use) { return use.first == factors; });
            strengths = std::fill_n(strengths, factors->rank(), own == row.end() ? 0.0f : static_cast<float>(own->second));
        }
    return made;
}

// What each row's outputs are multiplied with: DoRA's magnitude / |W + strength D|, or 1.
Tensor gains(const TensorSpec &gain, const std::vector<Uses> &rows, const std::string &layer) {
    Shape shape{static_cast<std::int64_t>(rows.size())};
    for (std::size_t k = 1; k < gain.shape.size(); ++k) shape.push_back(gain.shape[k].size);  // all but the rows are fixed
    Tensor made = Tensor::zeros<float>(shape);
    float *out = made.as<float>();
    const std::size_t count = made.count() / rows.size();
    for (const Uses &row : rows) {
        float *const own = out;
        out = std::fill_n(out, count, 1.0f);
        const auto dora = std::find_if(row.begin(), row.end(), [](const auto &use) { return use.first->magnitude.has_value(); });
        if (dora == row.end()) continue;
        if (row.size() > 1)
            throw InputError(join("An adapter that is DoRA and another one change ", layer, " of one picture, which depends on "
                                  "the order. Give one of them, or merge them: ldm-export export CHECKPOINT -o BUNDLE --lora "
                                  "ADAPTER.safetensors"));
        const float *magnitude = dora->first->magnitude->as<float>(), *norms = dora->first->norms->as<float>();
        if (dora->first->magnitude->count() != count)
            throw InputError(join("An adapter's magnitudes for ", layer, " are not as many as its branch takes."));
        const double s = dora->second;
        for (std::size_t k = 0; k < count; ++k) {
            const double square = norms[k] + 2 * s * norms[count + k] + s * s * norms[2 * count + k];
            own[k] = static_cast<float>(magnitude[k] / std::sqrt(square));
            if (!std::isfinite(own[k]))
                throw InputError(join("An adapter that is DoRA leaves nothing of a row of ", layer, ". Give it another strength."));
        }
    }
    return made;
}

}  // namespace

std::vector<Mixture> mixtures_for(const Bundle &bundle, const ldm_draw_options &options, std::size_t count) {
    std::vector<Mixture> mixtures(count);
    if (options.adapter_count == 0) return mixtures;
    if (options.adapters == nullptr)
        throw InputError(join(options.adapter_count, " adapters were given, and adapters is NULL. Give their files."));
    if (options.whole != 0)
        throw InputError("The whole loop was asked for at once, and a loop graph takes no adapters. Leave whole out, or merge "
                         "them: ldm-export export CHECKPOINT -o BUNDLE --lora ADAPTER.safetensors");
    for (std::size_t k = 0; k < options.adapter_count; ++k) {
        if (options.adapters[k] == nullptr) throw InputError(join("Adapter ", k, " is NULL; give its file."));
        const double strength = options.adapter_strengths == nullptr ? 1.0 : options.adapter_strengths[k];
        if (!(std::abs(strength) <= LARGEST_STRENGTH))
            throw InputError(join("an adapter's strength is ", strength, "; give a number from -1000 to 1000."));
        const std::int64_t picture = options.adapter_pictures == nullptr ? -1 : options.adapter_pictures[k];
        if (picture < -1 || picture >= static_cast<std::int64_t>(count))
            throw InputError(join("adapter ", k, " is for picture ", picture, "; there are 0 to ", count - 1, ", and -1 is all."));
        const std::shared_ptr<const Adapter> adapter = opened(options.adapters[k]);
        check_fits(*adapter, bundle);
        for (std::size_t row = 0; row < count; ++row) {
            if (picture != -1 && static_cast<std::size_t>(picture) != row) continue;
            for (const auto &[other, _] : mixtures[row])
                if (other == adapter)
                    throw InputError(adapter->path.string() + " was given twice for one picture. Give it once, with the sum.");
            mixtures[row].emplace_back(adapter, strength);
        }
    }
    return mixtures;
}

bool changes(const std::vector<Mixture> &rows, const std::string &graph) {
    return std::any_of(rows.begin(), rows.end(), [&](const Mixture &row) {
        return std::any_of(row.begin(), row.end(), [&](const auto &use) { return use.first->factors.count(graph) != 0; });
    });
}

bool is_branch_input(const std::string &name) {
    return name.rfind(BRANCH, 0) == 0 && (ends_with(name, DOWN) || ends_with(name, UP) || ends_with(name, SCALE) ||
                                          ends_with(name, GAIN));
}

Tensors branch_arrays(const GraphSpec &graph, const std::string &name, const std::vector<Mixture> &rows) {
    std::set<std::string> layers;
    for (const TensorSpec &input : graph.inputs)
        if (is_branch_input(input.name) && ends_with(input.name, DOWN))
            layers.insert(input.name.substr(std::strlen(BRANCH), input.name.size() - std::strlen(BRANCH) - std::strlen(DOWN)));
    for (const Mixture &row : rows)
        for (const auto &[adapter, _] : row)
            if (const auto factors = adapter->factors.find(name); factors != adapter->factors.end())
                for (const auto &[layer, own] : factors->second)
                    if (layers.count(layer) == 0 || (own.magnitude && graph.input(BRANCH + layer + GAIN) == nullptr))
                        throw InputError(join(adapter->path.string(), " changes ", layer, " of ", name, ", which this bundle has "
                                              "no branch for. Run ldm-export lora with this bundle and the adapter's own file "
                                              "once more, and open the bundle anew."));
    Tensors found;
    for (const std::string &layer : layers) {
        const TensorSpec *down = graph.input(BRANCH + layer + DOWN), *up = graph.input(BRANCH + layer + UP);
        const TensorSpec *scale = graph.input(BRANCH + layer + SCALE);
        const std::size_t sizes = down->shape.size(), axes = scale == nullptr ? 2 : sizes;
        const bool whole = scale == nullptr ? sizes > 2 : (sizes == 2 || sizes == 4) && scale->shape.size() == sizes;
        if (up == nullptr || up->shape.size() != sizes || !whole)
            throw BundleError(join(graph.path, " has no whole branch beside ", layer, ". Make it anew."));
        std::vector<Uses> uses;
        for (const Mixture &row : rows) {
            uses.push_back(uses_of(row, name, layer));
            for (const auto &[own, _] : uses.back())
                if (!fits(own->down, down->shape, axes) || !fits(own->up, up->shape, axes))
                    throw InputError(join("An adapter's factors for ", layer, " of ", name, " have other shapes than its branch takes."));
        }
        if (const TensorSpec *gain = graph.input(BRANCH + layer + GAIN); gain != nullptr)
            found[gain->name] = gains(*gain, uses, layer + " of " + name);
        if (scale == nullptr) {
            auto [first, second] = by_row(*down, *up, uses);
            found[down->name] = std::move(first);
            found[up->name] = std::move(second);
            continue;
        }
        Beside beside = side_by_side(*down, *up, *scale, uses);
        found[down->name] = std::move(beside.down);
        found[up->name] = std::move(beside.up);
        found[scale->name] = std::move(beside.scale);
    }
    return found;
}

}  // namespace ldm::runtime
