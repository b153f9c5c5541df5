#include "onnx_wire.hpp"

#include "error.hpp"
#include "json.hpp"
#include "unicode.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace ldm::runtime {

namespace {

enum class Message { model, training, function, graph, node, attribute, sparse, tensor };

struct Way {
    Message from;
    std::uint64_t number;
    Message to;
    bool once;  // occurs once in its message at most; of two, readers of protobuf merge them or take one
};
// The ways that lead to tensors and nodes; everything else is skipped.
constexpr Way WAYS[] = {
    {Message::model, 7, Message::graph, true},          {Message::model, 20, Message::training, false},
    {Message::model, 25, Message::function, false},     {Message::training, 1, Message::graph, true},
    {Message::training, 2, Message::graph, true},       {Message::function, 7, Message::node, false},
    {Message::function, 11, Message::attribute, false}, {Message::graph, 1, Message::node, false},
    {Message::graph, 5, Message::tensor, false},        {Message::graph, 15, Message::sparse, false},
    {Message::node, 5, Message::attribute, false},      {Message::attribute, 5, Message::tensor, true},
    {Message::attribute, 6, Message::graph, true},      {Message::attribute, 10, Message::tensor, false},
    {Message::attribute, 11, Message::graph, false},    {Message::attribute, 22, Message::sparse, true},
    {Message::attribute, 23, Message::sparse, false},   {Message::sparse, 1, Message::tensor, true},
    {Message::sparse, 2, Message::tensor, true},
};

// Fields of text and numbers that are read. Each occurs once in its message at most.
constexpr std::uint64_t TENSOR_NAME = 8, TENSOR_RAW_DATA = 9, TENSOR_EXTERNAL_DATA = 13, TENSOR_DATA_LOCATION = 14;
constexpr std::uint64_t ENTRY_KEY = 1, ENTRY_VALUE = 2;
constexpr std::uint64_t NODE_OP_TYPE = 4, NODE_DOMAIN = 7, NODE_OVERLOAD = 8;
constexpr std::uint64_t FUNCTION_NAME = 1, FUNCTION_DOMAIN = 10, FUNCTION_OVERLOAD = 13;
constexpr std::uint64_t EXTERNAL = 1;
constexpr const char *PREPACKED = "prepacked_";    // ONNX Runtime's own, of weights in its kernels' layout
constexpr const char *READS_FILES = "EPContext";   // an operator that is a compiled graph in another file
constexpr std::string_view ORT_FORMAT = "ORTM";    // at byte 4 of a file that ONNX Runtime takes for its own format
constexpr std::string_view ENTRIES[] = {"location", "offset", "length", "checksum"};
constexpr int DEEPEST = 100;  // protobuf's own limit on nesting
constexpr std::size_t LONGEST_TEXT = 1 << 16;
constexpr std::uint64_t MOST_NODES = 1 << 17;  // with functions inlined, for which ONNX Runtime takes some 100 us each

constexpr int VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5;

struct Field {
    std::uint64_t number;
    int wire_type;
    std::uint64_t value;       // of a varint
    std::string_view payload;  // of bytes
};

// The fields of a message, one after the other.
class Fields {
  public:
    explicit Fields(std::string_view message) : left_(message) {}

    std::optional<Field> next() {
        if (left_.empty()) return std::nullopt;
        const std::uint64_t key = varint(5);
        if (key > UINT32_MAX) throw MalformedError("a field's number is larger than protobuf allows");
        Field field{key >> 3, static_cast<int>(key & 7), 0, {}};
        if (field.number == 0) throw MalformedError("a field is numbered 0");
        switch (field.wire_type) {
            case VARINT: field.value = varint(10); break;
            case FIXED64: take(8); break;
            case BYTES: field.payload = take(varint(5)); break;
            case FIXED32: take(4); break;
            default: throw MalformedError(join("it has the wire type ", field.wire_type, ", which ONNX does not use"));
        }
        return field;
    }

  private:
    // A number in as few bytes as it takes, at most so many; readers of protobuf differ on longer ones.
    std::uint64_t varint(int most_bytes) {
        std::uint64_t value = 0;
        for (int k = 0; k < most_bytes && !left_.empty(); ++k) {
            const auto byte = static_cast<unsigned char>(left_.front());
            left_.remove_prefix(1);
            if (k == 9 && byte > 1) break;
            value |= static_cast<std::uint64_t>(byte & 0x7F) << (7 * k);
            if (byte >= 0x80) continue;
            if (byte == 0 && k > 0) throw MalformedError("a number is written in more bytes than it takes");
            return value;
        }
        throw MalformedError("a number does not end");
    }

    std::string_view take(std::uint64_t length) {
        if (length > left_.size()) throw MalformedError("a field runs past its message: it is cut short or altered");
        const std::string_view taken = left_.substr(0, length);
        left_.remove_prefix(length);
        return taken;
    }

    std::string_view left_;
};

std::string text_of(const Field &field) {
    if (field.payload.size() > LONGEST_TEXT) throw MalformedError(join("a text is ", field.payload.size(), " bytes long"));
    if (!is_utf8(field.payload)) throw MalformedError("a text is not UTF-8");
    return std::string(field.payload);
}

// The values of a message's fields that occur once at most.
class Once {
  public:
    // Note a field; throws MalformedError where it occurred already, or is of another wire type.
    void note(const Field &field, int wire_type) {
        if (field.wire_type != wire_type) throw MalformedError(join("field ", field.number, " has another type than in ONNX"));
        if (std::find(seen_.begin(), seen_.end(), field.number) != seen_.end())
            throw MalformedError(join("field ", field.number, " occurs twice in one message"));
        seen_.push_back(field.number);
    }

  private:
    std::vector<std::uint64_t> seen_;
};

std::uint64_t number_of(const std::string &tensor, const std::string &key, const std::string &value) {
    if (value.empty() || value.size() >= 19 || value.find_first_not_of("0123456789") != std::string::npos)
        throw MalformedError(join("tensor '", tensor, "' has the external ", key, " '", value, "'"));
    return std::stoull(value);
}

std::pair<std::string, std::string> entry_of(std::string_view bytes) {
    std::pair<std::string, std::string> entry;
    Once once;
    Fields parts(bytes);
    while (const auto part = parts.next()) {
        if (part->number != ENTRY_KEY && part->number != ENTRY_VALUE) continue;
        once.note(*part, BYTES);
        (part->number == ENTRY_KEY ? entry.first : entry.second) = text_of(*part);
    }
    return entry;
}

// Nodes of a graph or a function with those of its nested graphs, and the functions that they may be calls of.
struct Body {
    std::uint64_t nodes = 0;
    std::map<std::string, std::uint64_t> calls;  // how many nodes call it, by what names it
};

std::string call_of(std::string domain, const std::string &name, const std::string &overload) {
    if (domain == "ai.onnx") domain.clear();  // the same, written out
    return domain + '\0' + name + '\0' + overload;
}

class Scanner {
  public:
    std::vector<ExternalData> found;

    void scan(std::string_view model) {
        if (model.size() >= 8 && model.substr(4, 4) == ORT_FORMAT) throw MalformedError("it is of ONNX Runtime's own format");
        walk(Message::model, model, 0);
        if (!has_graph_) throw MalformedError("it has no graph");
        for (const auto &[name, _] : functions_) inlined(name, 0);
        inlined(main_, 0);
    }

  private:
    void walk(Message message, std::string_view bytes, int depth) {
        if (depth > DEEPEST) throw MalformedError(join("its messages are nested deeper than ", DEEPEST));
        if (message == Message::tensor) return tensor(bytes);
        if (message == Message::node) return node(bytes, depth);
        if (message == Message::function) return function(bytes, depth);
        Once once;
        Fields fields(bytes);
        while (const auto field = fields.next()) follow(message, *field, depth, once);
    }

    void follow(Message message, const Field &field, int depth, Once &once) {
        const Way *way = std::find_if(std::begin(WAYS), std::end(WAYS), [&](const Way &one) {
            return one.from == message && one.number == field.number;
        });
        if (way == std::end(WAYS)) return;
        if (way->once)
            once.note(field, BYTES);
        else if (field.wire_type != BYTES)
            throw MalformedError(join("field ", field.number, " has another type than in ONNX"));
        has_graph_ = has_graph_ || (message == Message::model && way->to == Message::graph);
        walk(way->to, field.payload, depth + 1);
    }

    void node(std::string_view bytes, int depth) {
        std::string name, domain, overload;
        Once once;
        Fields fields(bytes);
        while (const auto field = fields.next()) {
            std::string *text = field->number == NODE_OP_TYPE    ? &name
                                : field->number == NODE_DOMAIN   ? &domain
                                : field->number == NODE_OVERLOAD ? &overload
                                                                 : nullptr;
            if (text == nullptr) {
                follow(Message::node, *field, depth, once);
                continue;
            }
            once.note(*field, BYTES);
            *text = text_of(*field);
        }
        if (name == READS_FILES) throw MalformedError(join("it has a node ", READS_FILES, ", which reads a graph from another file"));
        ++body_->nodes;
        ++body_->calls[call_of(domain, name, overload)];
    }

    void function(std::string_view bytes, int depth) {
        Body own;
        body_ = &own;
        std::string name, domain, overload;
        Once once;
        Fields fields(bytes);
        while (const auto field = fields.next()) {
            std::string *text = field->number == FUNCTION_NAME       ? &name
                                : field->number == FUNCTION_DOMAIN   ? &domain
                                : field->number == FUNCTION_OVERLOAD ? &overload
                                                                     : nullptr;
            if (text == nullptr) {
                follow(Message::function, *field, depth, once);
                continue;
            }
            once.note(*field, BYTES);
            *text = text_of(*field);
        }
        body_ = &main_;
        if (!functions_.emplace(call_of(domain, name, overload), std::move(own)).second)
            throw MalformedError(join("it has two functions '", name, "'"));
    }

    void tensor(std::string_view bytes) {
        std::string name;
        std::map<std::string, std::string> entries;
        std::uint64_t location = 0;
        bool raw = false;
        Once once;
        Fields fields(bytes);
        while (const auto field = fields.next()) {
            if (field->number == TENSOR_NAME) {
                once.note(*field, BYTES);
                name = text_of(*field);
            } else if (field->number == TENSOR_RAW_DATA) {
                once.note(*field, BYTES);
                raw = !field->payload.empty();
            } else if (field->number == TENSOR_DATA_LOCATION) {
                once.note(*field, VARINT);
                location = field->value;
            } else if (field->number == TENSOR_EXTERNAL_DATA) {
                if (field->wire_type != BYTES) throw MalformedError("field 13 has another type than in ONNX");
                const auto [entry, is_new] = entries.insert(entry_of(field->payload));
                const bool known = std::find(std::begin(ENTRIES), std::end(ENTRIES), entry->first) != std::end(ENTRIES) ||
                                   entry->first.rfind(PREPACKED, 0) == 0;
                if (!is_new || !known)
                    throw MalformedError(join("tensor '", name, "' has external data with ", is_new ? "the unknown " : "two of ",
                                              "'", entry->first, "'"));
            }
        }
        const bool outside = location == EXTERNAL;
        if (!outside && location == 0 && entries.empty()) return;
        if (!outside || raw || entries.count("location") == 0)
            throw MalformedError(join("tensor '", name, "' ",
                                      location > EXTERNAL ? join("has the data location ", location)
                                      : !outside          ? "says where its data lie, and that they lie in the model"
                                      : raw               ? "has data in the model and outside of it"
                                                          : "has external data without a location"));
        ExternalData data{name, entries["location"], 0, std::nullopt};
        if (entries.count("offset") != 0) data.offset = number_of(name, "offset", entries["offset"]);
        if (entries.count("length") != 0) data.length = number_of(name, "length", entries["length"]);
        found.push_back(std::move(data));
    }

    // A body once all functions that it calls are inlined, and theirs.
    struct Size {
        std::uint64_t nodes;
        int calls;  // most calls inside one another
    };

    Size inlined(const Body &body, int depth) {
        Size size{body.nodes, 0};
        for (const auto &[call, count] : body.calls) {
            if (functions_.count(call) == 0) continue;
            const Size inner = inlined(call, depth + 1);
            size = {size.nodes + count * inner.nodes, std::max(size.calls, inner.calls + 1)};
            if (size.nodes > MOST_NODES)
                throw MalformedError(join("it has more than ", MOST_NODES, " nodes, with its functions inlined"));
        }
        return size;
    }

    Size inlined(const std::string &function, int depth) {
        auto known = sizes_.find(function);
        if (known == sizes_.end() && depth <= DEEPEST)  // no function that calls itself ever gets a size
            known = sizes_.emplace(function, inlined(functions_.at(function), depth)).first;
        if (known == sizes_.end() || known->second.calls >= DEEPEST)
            throw MalformedError(join("its functions call one another more than ", DEEPEST, " deep, or without end"));
        return known->second;
    }

    bool has_graph_ = false;
    Body main_, *body_ = &main_;
    std::map<std::string, Body> functions_;
    std::map<std::string, Size> sizes_;  // of functions
};

}  // namespace

std::vector<ExternalData> external_data_from_bytes(std::string_view model) {
    Scanner scanner;
    scanner.scan(model);
    return std::move(scanner.found);
}

}  // namespace ldm::runtime
