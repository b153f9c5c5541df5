#include "prompts.hpp"

#include "error.hpp"
#include "repr.hpp"
#include "tokenizer_clip.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace ldm::runtime {

namespace {

constexpr const char *CHUNKED_KIND = TOKENIZER_KINDS[0];
constexpr double EMPHASIS = 1.1, LARGEST_WEIGHT = 100, LEAST_MEAN = 1e-4;
constexpr std::size_t MOST_NESTED = 100, MOST_CHUNKS = 32;
constexpr const char *SIGNS = "\\()[]:", *WHITE = " \t\n\r\f\v", *DIGITS = "0123456789";

std::size_t past(const std::string &text, std::size_t at, const char *signs) {
    return std::min(text.find_first_not_of(signs, at), text.size());
}

// A colon, a number and a bracket that closes, such as ":1.2)", at a place of a text.
struct Number {
    std::size_t end = 0;  // of the bracket; 0 where there is none
    double value = 0;
};

Number number_at(const std::string &text, std::size_t colon) {
    std::size_t start = past(text, colon + 1, WHITE);
    const bool negative = start < text.size() && text[start] == '-';
    if (start < text.size() && (negative || text[start] == '+')) ++start;
    const std::size_t whole = past(text, start, DIGITS);
    const bool dotted = whole < text.size() && text[whole] == '.';
    const std::size_t stop = dotted ? past(text, whole + 1, DIGITS) : whole, closing = past(text, stop, WHITE);
    const bool has_digits = stop - start > (dotted ? 1u : 0u);
    if (!has_digits || closing == text.size() || text[closing] != ')') return {};
    double value = 0;
    if (std::from_chars(text.data() + start, text.data() + stop, value).ec == std::errc::result_out_of_range) {
        const bool is_large = text.find_first_not_of('0', start) < whole;
        value = is_large ? std::numeric_limits<double>::infinity() : 0;
    }
    return {closing + 1, negative ? -value : value};
}

class Parser {
  public:
    explicit Parser(const std::string &prompt) {
        for (std::size_t at = 0; at < prompt.size();) at = read(prompt, at);
        for (const std::size_t start : round_) weigh(start, EMPHASIS);
        for (const std::size_t start : square_) weigh(start, 1 / EMPHASIS);
    }

    std::vector<Part> merged() const {
        std::vector<Part> found;
        for (const Part &part : parts_) {
            if (!(std::fabs(part.weight) <= LARGEST_WEIGHT))
                throw InputError(join("The prompt gives ", short_repr(part.text), " the weight ", part.weight,
                                      "; weights are from -", LARGEST_WEIGHT, " to ", LARGEST_WEIGHT, ". Use a smaller one."));
            if (!found.empty() && found.back().weight == part.weight)
                found.back().text += part.text;
            else
                found.push_back(part);
        }
        return found;
    }

  private:
    // What is at a place of the prompt; gives the place behind it.
    std::size_t read(const std::string &prompt, std::size_t at) {
        const char sign = prompt[at];
        if (sign == '\\') {
            const bool escapes = at + 1 < prompt.size() && std::string("\\()[]").find(prompt[at + 1]) != std::string::npos;
            parts_.push_back({escapes ? prompt.substr(at + 1, 1) : "", 1});
            return at + (escapes ? 2 : 1);
        }
        if (sign == '(' || sign == '[') {
            (sign == '(' ? round_ : square_).push_back(parts_.size());
            if (round_.size() + square_.size() > MOST_NESTED)
                throw InputError(join("The prompt has more than ", MOST_NESTED, " brackets within one another. Use a number."));
            return at + 1;
        }
        if (sign == ')' && !round_.empty()) return close(round_, EMPHASIS, at + 1);
        if (sign == ']' && !square_.empty()) return close(square_, 1 / EMPHASIS, at + 1);
        std::size_t end = at + 1;
        if (sign == ':') {
            const Number number = number_at(prompt, at);
            if (number.end != 0 && !round_.empty()) return close(round_, number.value, number.end);
            end = number.end == 0 ? end : number.end;
        } else if (sign != ')' && sign != ']') {
            end = std::min(prompt.find_first_of(SIGNS, at), prompt.size());
        }
        parts_.push_back({prompt.substr(at, end - at), 1});
        return end;
    }

    std::size_t close(std::vector<std::size_t> &opened, double weight, std::size_t end) {
        weigh(opened.back(), weight);
        opened.pop_back();
        return end;
    }

    void weigh(std::size_t start, double weight) {
        for (std::size_t part = start; part < parts_.size(); ++part) parts_[part].weight *= weight;
    }

    std::vector<Part> parts_;
    std::vector<std::size_t> round_, square_;  // where brackets were opened
};

// The mean times how many there are; 0 where it is none beside the values.
double total_of(const Tensor &states) {
    double total = 0, magnitude = 0;
    const float *values = states.as<float>();
    for (std::size_t i = 0; i < states.count(); ++i) {
        total += double{values[i]};
        magnitude += std::fabs(double{values[i]});
    }
    return std::fabs(total) > LEAST_MEAN * magnitude ? total : 0;
}

}  // namespace

void check_reading(const Reading &reading, const Roles &roles, const GraphSpecs &graphs, bool whole) {
    if (!reading.weights && !reading.chunks) return;
    const char *asked = reading.weights ? "prompt_weights" : "long_prompts";
    if (roles.text_encoders.empty()) throw InputError(join(asked, " was asked for; this model reads no text. Leave it out."));
    for (const TextEncoder &encoder : roles.text_encoders)
        if (encoder.kind != CHUNKED_KIND)
            throw InputError(join(asked, " was asked for; it is for tokenizers of the kind '", CHUNKED_KIND,
                                  "', and this model's ", encoder.graph, " has one of the kind '", encoder.kind,
                                  "'. Leave it out."));
    if (whole)
        throw InputError(join(asked, " was asked for with the whole loop at once; a loop graph reads each prompt as it stands. "
                              "Leave one of them out."));
    if (reading.chunks && joined_conditions(roles, graphs).empty())
        throw InputError("long_prompts was asked for; this model's denoiser reads a fixed number of tokens. Leave it out.");
}

std::set<std::string> joined_conditions(const Roles &roles, const GraphSpecs &graphs) {
    std::set<std::string> found;
    for (const TensorSpec &tensor : graphs.at(roles.denoiser).inputs)
        if (roles.conditions.count(tensor.name) != 0 && tensor.shape.size() == 3 && tensor.shape[1].is_free())
            found.insert(tensor.name);
    return found;
}

std::vector<Part> weighted_parts(const std::string &prompt) { return Parser(prompt).merged(); }

std::vector<TokenRow> token_rows(const Tokenizer &tokenizer, const std::string &prompt, const Reading &reading,
                                 const Warn &warn) {
    const auto *reader = dynamic_cast<const ClipTokenizer *>(&tokenizer);
    if (reader == nullptr || (!reading.weights && !reading.chunks)) return {{tokenizer(prompt, warn), {}}};
    std::vector<TokenId> ids;
    std::vector<float> weights;
    for (const Part &part : reading.weights ? weighted_parts(prompt) : std::vector<Part>{{prompt, 1}}) {
        const std::vector<TokenId> body = reader->all(part.text);
        ids.insert(ids.end(), body.begin(), body.end());
        weights.resize(ids.size(), static_cast<float>(part.weight));
    }
    const std::size_t length = tokenizer.max_length(), room = length - 2;
    if (!reading.chunks)
        reader->cut(ids, warn);
    else if (room == 0)
        throw InputError("long_prompts was asked for; this model reads no token of a prompt. Leave it out.");
    const std::size_t count = std::max<std::size_t>(1, room == 0 ? 1 : (ids.size() + room - 1) / room);
    if (count > MOST_CHUNKS)
        throw InputError(join("The prompt has ", ids.size(), " tokens, which are ", count, " chunks; at most ", MOST_CHUNKS,
                              " are read. Shorten it."));
    std::vector<TokenRow> rows(count);
    for (std::size_t k = 0; k < count; ++k) {
        const std::size_t from = k * room, to = std::min(from + room, ids.size());
        const auto at = [](auto &values, std::size_t place) { return values.begin() + static_cast<std::ptrdiff_t>(place); };
        rows[k].ids = reader->framed({at(ids, from), at(ids, to)});
        std::vector<float> framed(length, 1);
        std::copy(at(weights, from), at(weights, to), framed.begin() + 1);
        if (std::any_of(framed.begin(), framed.end(), [](float weight) { return weight != 1; })) rows[k].weights = framed;
    }
    return rows;
}

void weigh(Tensor &states, const std::vector<float> &weights) {
    const double before = total_of(states);
    float *values = states.as<float>();
    const std::size_t width = states.count() / weights.size();
    for (std::size_t i = 0; i < states.count(); ++i) values[i] *= weights[i / width];
    const double after = total_of(states);
    if (before == 0 || after == 0) return;
    const auto restored = static_cast<float>(before / after);
    for (std::size_t i = 0; i < states.count(); ++i) values[i] *= restored;
}

}  // namespace ldm::runtime
