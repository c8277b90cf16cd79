// The parts of rows.h that are O(rows): compiled once, for every processor.
#include "rows.h"

#include <cmath>

namespace ffcl {

int class_ids(int64_t rows, const int64_t* order, const int64_t* group, int64_t* ids, float* count) {
  if (rows < 0 || !order || !group || !ids) return bad_argument;
  for (int64_t first = 0; first < rows;) {
    int64_t last = first + 1;
    while (last < rows && group[last] == group[first]) ++last;
    for (int64_t e = first; e < last; ++e) {
      ids[order[e]] = last - first == 2 ? order[first] : order[e];
      if (count) count[order[e]] = static_cast<float>(last - first - 1);
    }
    first = last;
  }
  return ok;
}

int contrast_losses(int64_t n, const float* lse, const double* dot, const float* count, double scale, Contrast kind,
                    bool add, float* loss, float* slope) {
  if (n < 0 || !lse || !dot || !loss || !slope || (kind == Contrast::mean) != (count != nullptr)) return bad_argument;
  if (kind < Contrast::softplus || kind > Contrast::mean) return bad_argument;
  for (int64_t i = 0; i < n; ++i) {
    const double positives = count ? count[i] : 1.0, logit = scale * dot[i];
    double value = lse[i] != lse[i] ? lse[i] : 0, derivative = 0;  // a row without positives still tells of a NaN
    if (positives > 0) {
      const double x = std::isinf(logit) ? NAN : lse[i] - logit / positives;
      if (kind == Contrast::softplus || (kind == Contrast::mean && positives == 1)) {
        const double e = std::exp(-std::fabs(x));
        value = std::fmax(x, 0.0) + std::log1p(e);
        derivative = x >= 0 ? 1 / (1 + e) : e / (1 + e);
        if (x != x) value = derivative = x;
      } else if (kind == Contrast::mean || x != -INFINITY) {
        value = x;
        derivative = 1;
      }
    }
    loss[i] = static_cast<float>(add ? loss[i] + value : value);
    slope[i] = static_cast<float>(derivative);
  }
  return ok;
}

int contrast_weights(int64_t n, const float* grad, const float* slope, const float* col_slope, const float* count,
                     double scale, float* row_grad, float* col_grad, float* weight) {
  if (n < 0 || !grad || !slope || !row_grad || !weight || (col_slope && !col_grad)) return bad_argument;
  for (int64_t i = 0; i < n; ++i) {
    row_grad[i] = grad[i] * slope[i];
    double share = static_cast<double>(grad[i]) * slope[i];
    if (col_slope) {
      col_grad[i] = grad[i] * col_slope[i];
      share += static_cast<double>(grad[i]) * col_slope[i];
    }
    if (count) share = count[i] > 0 ? share / count[i] : 0;
    weight[i] = static_cast<float>(-scale * share);
  }
  return ok;
}

}  // namespace ffcl
