// Arrays that graphs take and give.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace ldm::runtime {

using Shape = std::vector<std::int64_t>;

// How many elements; throws std::bad_alloc where they could never be held.
inline std::size_t count_of(const Shape &shape) {
    std::size_t count = 1;
    for (const std::int64_t size : shape) {
        if (size != 0 && count > static_cast<std::size_t>(INT64_MAX) / 8 / static_cast<std::size_t>(size))
            throw std::bad_alloc();
        count *= static_cast<std::size_t>(size);
    }
    return count;
}

// A contiguous array of one of numpy's types float32, float16, int64 and uint8.
struct Tensor {
    std::string dtype;
    Shape shape;
    std::vector<std::byte> data;

    template <class T>
    static Tensor zeros(Shape shape) {
        const std::size_t bytes = count_of(shape) * sizeof(T);
        return {name_of(T()), std::move(shape), std::vector<std::byte>(bytes)};
    }
    template <class T>
    T *as() {
        return reinterpret_cast<T *>(data.data());
    }
    template <class T>
    const T *as() const {
        return reinterpret_cast<const T *>(data.data());
    }
    std::size_t count() const { return count_of(shape); }

  private:
    static const char *name_of(float) { return "float32"; }
    static const char *name_of(std::int64_t) { return "int64"; }
    static const char *name_of(std::uint8_t) { return "uint8"; }
};

using Tensors = std::map<std::string, Tensor>;                               // by name
using TensorRefs = std::map<std::string, Tensor *>;                          // where they lie; the caller's
using SharedTensors = std::shared_ptr<const Tensors>;

}  // namespace ldm::runtime
