// CPU kernels of rows.h. Bound by memory. One thread owns a row, or a class of rows, and sums run in float64 in a fixed
// order, so results do not depend on the number of threads.
#include "rows.h"

#include <cmath>

#include "tile.h"

namespace ffcl {
namespace FFCL_ISA_NS {
namespace {

constexpr int64_t TASK_ELEMENTS = 1 << 15;  // work a thread takes at a time; below it one thread is faster

// Sum of term(d) over d, in eight chains so that the additions do not wait for each other.
template <class F>
FFCL_INLINE double sum_over(int64_t n, F&& term) {
  double s[8] = {};
  int64_t d = 0;
  for (; d + 8 <= n; d += 8)
    for (int l = 0; l < 8; ++l) s[l] += term(d + l);
  for (; d < n; ++d) s[0] += term(d);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// f(source, get) with z[i, d] = get(row + d, norm of row i), so that loops over d hold no branch, and no division
// where rows are not divided.
template <class F>
FFCL_INLINE void by_rows(const Rows& z, bool divided, F&& f) {
  by_type(z, [&](auto source, auto type) {
    using T = decltype(type);
    if (divided)
      f(source, [](const typename T::type* x, float norm) { return T::get(x) / norm; });
    else
      f(source, [](const typename T::type* x, float) { return T::get(x); });
  });
}

template <class F>
void for_rows(const Rows& z, int threads, F&& body) {
  const int64_t step = larger(1, TASK_ELEMENTS / z.dim);
  parallel((z.rows + step - 1) / step, threads, [&](int64_t task, int) {
    for (int64_t i = task * step; i < smaller(z.rows, (task + 1) * step); ++i) body(i);
  });
}

// body(first, last, scratch) for every class, the entries [first, last) of `order`; scratch holds 2 dim doubles.
template <class F>
int for_classes(const Rows& z, const int64_t* group, int threads, F&& body) {
  Buffer<double> scratch(2 * z.dim * larger(1, threads));
  if (scratch.failed) return out_of_memory;
  const int64_t step = larger(1, TASK_ELEMENTS / z.dim);
  parallel((z.rows + step - 1) / step, threads, [&](int64_t task, int thread) {
    int64_t first = task * step;
    const int64_t end = smaller(z.rows, first + step);  // of the classes that start here
    while (first > 0 && first < end && group[first] == group[first - 1]) ++first;
    while (first < end) {
      int64_t last = first + 1;
      while (last < z.rows && group[last] == group[first]) ++last;
      body(first, last, scratch + 2 * z.dim * thread);
      first = last;
    }
  });
  return ok;
}

}  // namespace

int row_norms(const Rows& x, double eps, int threads, float* norm) {
  by_type(x, [&](auto source, auto type) {
    using T = decltype(type);
    for_rows(x, threads, [&](int64_t i) {
      const auto* row = source.row(i);
      const double squares = sum_over(x.dim, [&](int64_t d) {
        const double v = T::get(row + d);
        return v * v;
      });
      const float length = static_cast<float>(std::sqrt(squares)), least = static_cast<float>(eps);
      norm[i] = length < least ? least : length;
    });
  });
  return ok;
}

int row_dots(const Rows& a, const Rows& b, int threads, double* dot) {
  by_rows(a, a.norm || b.norm, [&](auto left, auto get) {
    const decltype(left) right(b);
    for_rows(a, threads, [&](int64_t i) {
      const auto *x = left.row(i), *y = right.row(i);
      const float x_norm = left.norm_of(i), y_norm = right.norm_of(i);
      dot[i] = sum_over(a.dim, [&](int64_t d) { return static_cast<double>(get(x + d, x_norm)) * get(y + d, y_norm); });
    });
  });
  return ok;
}

int add_weighted_rows(const Rows& z, const float* weight, int threads, float* grad) {
  by_rows(z, z.norm, [&](auto source, auto get) {
    for_rows(z, threads, [&](int64_t i) {
      const auto* row = source.row(i);
      const float norm = source.norm_of(i), w = weight[i];
      float* to = grad + i * z.dim;
      for (int64_t d = 0; d < z.dim; ++d) to[d] += w * get(row + d, norm);
    });
  });
  return ok;
}

int class_dots(const Rows& z, const int64_t* order, const int64_t* group, int threads, double* dot) {
  int status = ok;
  by_rows(z, z.norm, [&](auto source, auto get) {
    status = for_classes(z, group, threads, [&](int64_t first, int64_t last, double* total) {
      for (int64_t d = 0; d < z.dim; ++d) total[d] = 0;
      for (int64_t e = first; e < last; ++e) {
        const auto* row = source.row(order[e]);
        const float norm = source.norm_of(order[e]);
        for (int64_t d = 0; d < z.dim; ++d) total[d] += get(row + d, norm);
      }
      for (int64_t e = first; e < last; ++e) {
        const auto* row = source.row(order[e]);
        const float norm = source.norm_of(order[e]);
        dot[order[e]] = sum_over(z.dim, [&](int64_t d) {
          const double v = get(row + d, norm);
          return v * (total[d] - v);
        });
      }
    });
  });
  return status;
}

int add_class_gradient(const Rows& z, const int64_t* order, const int64_t* group, const float* weight, int threads,
                       float* grad) {
  int status = ok;
  by_rows(z, z.norm, [&](auto source, auto get) {
    status = for_classes(z, group, threads, [&](int64_t first, int64_t last, double* total) {
      double* weighted = total + z.dim;
      for (int64_t d = 0; d < z.dim; ++d) total[d] = weighted[d] = 0;
      for (int64_t e = first; e < last; ++e) {
        const auto* row = source.row(order[e]);
        const double w = weight[order[e]];
        const float norm = source.norm_of(order[e]);
        for (int64_t d = 0; d < z.dim; ++d) {
          const double v = get(row + d, norm);
          total[d] += v;
          weighted[d] += w * v;
        }
      }
      for (int64_t e = first; e < last; ++e) {
        const auto* row = source.row(order[e]);
        const double w = weight[order[e]];
        const float norm = source.norm_of(order[e]);
        float* to = grad + order[e] * z.dim;
        for (int64_t d = 0; d < z.dim; ++d) {
          const double v = get(row + d, norm);
          to[d] = static_cast<float>(to[d] + w * (total[d] - v) + (weighted[d] - w * v));
        }
      }
    });
  });
  return status;
}

int finish_gradient(const Rows& z, double eps, int threads, float* grad, double* inner) {
  by_rows(z, z.norm, [&](auto source, auto get) {
    for_rows(z, threads, [&](int64_t i) {
      const auto* row = source.row(i);
      const float norm = source.norm_of(i);
      float* g = grad + i * z.dim;
      inner[i] = sum_over(z.dim, [&](int64_t d) { return static_cast<double>(get(row + d, norm)) * g[d]; });
      if (!z.norm) return;
      const float along = norm > static_cast<float>(eps) ? static_cast<float>(inner[i]) : 0.0f;
      for (int64_t d = 0; d < z.dim; ++d) g[d] = (g[d] - get(row + d, norm) * along) / norm;
    });
  });
  return ok;
}

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
