#include "onnx_wire.hpp"

#include "error.hpp"
#include "json.hpp"
#include "unicode.hpp"

#include <system_error>
#include <utility>

namespace ldm::runtime {

namespace {

enum class Message { model, training, function, graph, node, attribute, sparse, tensor };

struct Way {
    Message from;
    std::uint64_t number;
    Message to;
};
// The ways that lead to tensors; everything else is stepped over.
constexpr Way WAYS[] = {
    {Message::model, 7, Message::graph},       {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},   {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},    {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute}, {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},      {Message::graph, 15, Message::sparse},
    {Message::node, 5, Message::attribute},    {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},   {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},  {Message::attribute, 22, Message::sparse},
    {Message::attribute, 23, Message::sparse}, {Message::sparse, 1, Message::tensor},
    {Message::sparse, 2, Message::tensor},
};

constexpr std::uint64_t TENSOR_NAME = 8, TENSOR_EXTERNAL_DATA = 13, ENTRY_KEY = 1, ENTRY_VALUE = 2;
constexpr int DEEPEST = 100;  // protobuf's own limit on nesting
constexpr std::size_t LONGEST_TEXT = 1 << 16;

struct Field {
    std::uint64_t number;
    std::string_view payload;
};

// The length-delimited fields of a message; the others are stepped over.
class Fields {
  public:
    explicit Fields(std::string_view message) : left_(message) {}

    std::optional<Field> next() {
        while (!left_.empty()) {
            const std::uint64_t key = varint(), number = key >> 3;
            if (number == 0) throw MalformedError("a field is numbered 0");
            switch (key & 7) {
                case 0: varint(); break;
                case 1: take(8); break;
                case 2: return Field{number, take(varint())};
                case 5: take(4); break;
                default: throw MalformedError(join("it has the wire type ", key & 7, ", which ONNX does not use"));
            }
        }
        return std::nullopt;
    }

  private:
    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 70 && !left_.empty(); shift += 7) {
            const auto byte = static_cast<unsigned char>(left_.front());
            left_.remove_prefix(1);
            if (shift < 64) value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
            if (byte < 0x80) return value;
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

std::string text_of(std::string_view payload) {
    if (payload.size() > LONGEST_TEXT) throw MalformedError(join("a text is ", payload.size(), " bytes long"));
    if (!is_utf8(payload)) throw MalformedError("a text is not UTF-8");
    return std::string(payload);
}

std::uint64_t number_of(const std::string &tensor, const std::string &key, const std::string &value) {
    if (value.empty() || value.size() >= 20 || value.find_first_not_of("0123456789") != std::string::npos)
        throw MalformedError(join("tensor '", tensor, "' has the external ", key, " '", value, "'"));
    return std::stoull(value);
}

// One reference for each location; readers differ on which of two counts, so each must be allowed.
void append_references(std::string_view tensor, std::vector<ExternalData> &found) {
    std::string name;
    std::vector<std::pair<std::string, std::string>> entries;
    Fields fields(tensor);
    while (const auto field = fields.next()) {
        if (field->number == TENSOR_NAME) name = text_of(field->payload);
        if (field->number != TENSOR_EXTERNAL_DATA) continue;
        auto &[key, value] = entries.emplace_back();
        Fields parts(field->payload);
        while (const auto part = parts.next()) {
            const std::string text = text_of(part->payload);
            if (part->number == ENTRY_KEY) key = text;
            if (part->number == ENTRY_VALUE) value = text;
        }
    }
    ExternalData data{name, "", 0, std::nullopt};
    for (const auto &[key, value] : entries) {
        if (key == "offset") data.offset = number_of(name, key, value);
        if (key == "length") data.length = number_of(name, key, value);
    }
    bool located = false;
    for (const auto &[key, value] : entries)
        if (key == "location") {
            data.location = value;
            found.push_back(data);
            located = true;
        }
    if (!entries.empty() && !located)
        throw MalformedError(join("tensor '", name, "' has external data without a location"));
}

void append_references(Message message, std::string_view bytes, int depth, std::vector<ExternalData> &found) {
    if (depth > DEEPEST) throw MalformedError(join("its messages are nested deeper than ", DEEPEST));
    if (message == Message::tensor) return append_references(bytes, found);
    Fields fields(bytes);
    while (const auto field = fields.next())
        for (const Way &way : WAYS)
            if (way.from == message && way.number == field->number)
                append_references(way.to, field->payload, depth + 1, found);
}

}  // namespace

std::vector<ExternalData> external_data_from_bytes(std::string_view model) {
    bool has_graph = false;
    Fields fields(model);
    while (const auto field = fields.next()) has_graph = has_graph || field->number == 7;
    if (!has_graph) throw MalformedError("it has no graph");
    std::vector<ExternalData> found;
    append_references(Message::model, model, 0, found);
    return found;
}

std::vector<ExternalData> external_data_from_onnx(const fs::path &file) {
    const auto refused = [&](const std::exception &error) {
        return BundleError(
            join(file.string(), " is not a readable ONNX model: ", error.what(), ". Export the bundle anew."));
    };
    try {
        return external_data_from_bytes(MappedFile(file).bytes());
    } catch (const MalformedError &error) {
        throw refused(error);
    } catch (const std::system_error &error) {
        throw refused(error);
    }
}

}  // namespace ldm::runtime
