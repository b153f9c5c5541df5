// What schedules take of numpy, with its arithmetic, so that tables are those of ldm_export/plan to the last digits.
#pragma once

#include <vector>

namespace ldm::runtime {

using Vector = std::vector<double>;

// `count` evenly spaced numbers from start to stop, which is one of them.
Vector linspace(double start, double stop, std::size_t count);

// The line through the points (xp, fp), xp increasing, at x; beyond its ends it goes on level.
double interp(double x, const Vector &xp, const Vector &fp);

// x of matrix * x = right, by Gaussian elimination; not finite where there is none.
Vector solve(std::vector<Vector> matrix, Vector right);

}  // namespace ldm::runtime
