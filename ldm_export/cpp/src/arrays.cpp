#include "arrays.hpp"

#include <algorithm>
#include <cmath>

namespace ldm::runtime {

Vector linspace(double start, double stop, std::size_t count) {
    Vector values(count, start);
    if (count < 2) return values;
    const double parts = static_cast<double>(count - 1), whole = stop - start, step = whole / parts;
    for (std::size_t i = 0; i < count; ++i) {
        const double k = static_cast<double>(i);
        values[i] = (step != 0 ? k * step : k / parts * whole) + start;
    }
    values.back() = stop;
    return values;
}

double interp(double x, const Vector &xp, const Vector &fp) {
    if (std::isnan(x)) return x;
    if (x < xp.front()) return fp.front();
    const auto k = static_cast<std::size_t>(std::upper_bound(xp.begin(), xp.end(), x) - xp.begin()) - 1;
    if (k + 1 == xp.size()) return fp.back();
    if (x == xp[k]) return fp[k];
    return (fp[k + 1] - fp[k]) / (xp[k + 1] - xp[k]) * (x - xp[k]) + fp[k];
}

Vector solve(std::vector<Vector> matrix, Vector right) {
    const std::size_t size = right.size();
    for (std::size_t k = 0; k < size; ++k) {
        std::size_t pivot = k;
        for (std::size_t row = k + 1; row < size; ++row)
            if (std::abs(matrix[row][k]) > std::abs(matrix[pivot][k])) pivot = row;
        std::swap(matrix[k], matrix[pivot]);
        std::swap(right[k], right[pivot]);
        for (std::size_t row = k + 1; row < size; ++row) {
            const double factor = matrix[row][k] / matrix[k][k];
            for (std::size_t column = k; column < size; ++column) matrix[row][column] -= factor * matrix[k][column];
            right[row] -= factor * right[k];
        }
    }
    for (std::size_t k = size; k-- > 0;) {
        for (std::size_t column = k + 1; column < size; ++column) right[k] -= matrix[k][column] * right[column];
        right[k] /= matrix[k][k];
    }
    return right;
}

}  // namespace ldm::runtime
