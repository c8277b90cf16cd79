// CPU kernels of goodness.h. All are bound by memory: a row is read once from memory, a second time (for its normalised
// output or its gradient) from the cache that the first reading filled, and written once. One thread owns a row, so
// results do not depend on the number of threads.
//
// Sums run in float32 over blocks of BLOCK elements in four vectors, and the blocks' sums are added in float64: the
// rounding error does not grow with the length of the row.
#include "goodness.h"

#include "parallel.h"
#include "simd.h"

namespace ffcl {
namespace FFCL_ISA_NS {
namespace {

constexpr int64_t BLOCK = 4096;
constexpr int64_t TASK_ELEMENTS = 1 << 15;  // work a thread takes at a time; below it one thread is faster

FFCL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, bool relu>
FFCL_INLINE vf get(const typename T::type* p) {
  const vf x = T::load_vector(p);
  return relu ? max(zero(), x) : x;
}
template <class T, bool relu>
FFCL_INLINE float get_one(const typename T::type* p) {
  const float x = T::get(p);
  return relu && x <= 0 ? 0.0f : x;
}

// The gradient with respect to h from the one with respect to a.
template <bool relu>
FFCL_INLINE vf gate(vf a, vf grad) {
  return relu ? as_float(as_int(grad) & ~(a <= zero())) : grad;
}
template <bool relu>
FFCL_INLINE float gate_one(float a, float grad) {
  return relu && a <= 0 ? 0.0f : grad;
}

template <class T, bool relu>
double sum_squares(const typename T::type* h, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = least(n, i + BLOCK);
    vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (; i + 4 * VW <= end; i += 4 * VW) {
      const vf x0 = get<T, relu>(h + i), x1 = get<T, relu>(h + i + VW);
      const vf x2 = get<T, relu>(h + i + 2 * VW), x3 = get<T, relu>(h + i + 3 * VW);
      s0 += x0 * x0, s1 += x1 * x1, s2 += x2 * x2, s3 += x3 * x3;
    }
    for (; i + VW <= end; i += VW) {
      const vf x = get<T, relu>(h + i);
      s0 += x * x;
    }
    float rest = 0;
    for (; i < end; ++i) {
      const float x = get_one<T, relu>(h + i);
      rest += x * x;
    }
    total += sum((s0 + s1) + (s2 + s3)) + rest;
  }
  return total;
}

// <a, x>: x is not passed through ReLU.
template <class T, bool relu>
double dot(const typename T::type* h, const typename T::type* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = least(n, i + BLOCK);
    vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (; i + 4 * VW <= end; i += 4 * VW) {
      s0 += get<T, relu>(h + i) * T::load_vector(x + i);
      s1 += get<T, relu>(h + i + VW) * T::load_vector(x + i + VW);
      s2 += get<T, relu>(h + i + 2 * VW) * T::load_vector(x + i + 2 * VW);
      s3 += get<T, relu>(h + i + 3 * VW) * T::load_vector(x + i + 3 * VW);
    }
    for (; i + VW <= end; i += VW) s0 += get<T, relu>(h + i) * T::load_vector(x + i);
    float rest = 0;
    for (; i < end; ++i) rest += get_one<T, relu>(h + i) * T::get(x + i);
    total += sum((s0 + s1) + (s2 + s3)) + rest;
  }
  return total;
}

struct PairSums {
  double dot = 0, squares_1 = 0, squares_2 = 0;
};

template <class T, bool relu>
PairSums pair_sums(const typename T::type* h1, const typename T::type* h2, int64_t n) {
  PairSums total;
  for (int64_t i = 0; i < n;) {
    const int64_t end = least(n, i + BLOCK);
    vf d0 = zero(), d1 = zero(), p0 = zero(), p1 = zero(), q0 = zero(), q1 = zero();
    for (; i + 2 * VW <= end; i += 2 * VW) {
      const vf x0 = get<T, relu>(h1 + i), x1 = get<T, relu>(h1 + i + VW);
      const vf y0 = get<T, relu>(h2 + i), y1 = get<T, relu>(h2 + i + VW);
      d0 += x0 * y0, p0 += x0 * x0, q0 += y0 * y0;
      d1 += x1 * y1, p1 += x1 * x1, q1 += y1 * y1;
    }
    float d = 0, p = 0, q = 0;
    for (; i < end; ++i) {
      const float x = get_one<T, relu>(h1 + i), y = get_one<T, relu>(h2 + i);
      d += x * y, p += x * x, q += y * y;
    }
    total.dot += sum(d0 + d1) + d;
    total.squares_1 += sum(p0 + p1) + p;
    total.squares_2 += sum(q0 + q1) + q;
  }
  return total;
}

// out = gate(own, x * other - y * own), x and y numbers: the shape of both gradients.
template <class T, bool relu>
void combine(const typename T::type* own, const typename T::type* other, int64_t n, float x, float y,
             typename T::type* out) {
  int64_t i = 0;
  for (; i + VW <= n; i += VW) {
    const vf a = get<T, relu>(own + i);
    T::store_vector(out + i, gate<relu>(a, splat(x) * get<T, relu>(other + i) - splat(y) * a));
  }
  for (; i < n; ++i) {
    const float a = get_one<T, relu>(own + i);
    T::put(out + i, gate_one<relu>(a, x * get_one<T, relu>(other + i) - y * a));
  }
}

template <class T, bool relu>
void pair_gradients(const typename T::type* h1, const typename T::type* h2, int64_t n, const float* c, double scale,
                    typename T::type* d1, typename T::type* d2) {
  const float c0 = static_cast<float>(c[0] * scale), c1 = static_cast<float>(c[1] * scale);
  const float c2 = static_cast<float>(c[2] * scale);
  // By blocks, so that the second gradient finds both activations in the first-level cache.
  for (int64_t i = 0; i < n; i += BLOCK / 4) {
    const int64_t m = least(BLOCK / 4, n - i);
    if (d1) combine<T, relu>(h1 + i, h2 + i, m, c0, c1, d1 + i);
    if (d2) combine<T, relu>(h2 + i, h1 + i, m, c0, c2, d2 + i);
  }
}

// --- choosing the storage type and handing out rows ------------------------------------------------------------------

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class F>
int by_type(DType dtype, bool relu, F&& f) {
  switch (dtype) {
    case DType::float32: return relu ? f(Float32{}, Yes{}) : f(Float32{}, No{});
    case DType::bfloat16: return relu ? f(BFloat16{}, Yes{}) : f(BFloat16{}, No{});
    case DType::float16: return relu ? f(Float16{}, Yes{}) : f(Float16{}, No{});
  }
  return bad_argument;
}

template <class F>
struct RowTask {
  F& row;
  int64_t rows, rows_per_task;
};

// row(i) for every row of `dim` elements.
template <class F>
int for_each_row(int64_t rows, int64_t dim, int threads, F&& row) {
  RowTask<F> context{row, rows, TASK_ELEMENTS / dim + 1};
  const int64_t tasks = (rows + context.rows_per_task - 1) / context.rows_per_task;
  run_tasks(
      tasks, threads,
      [](void* p, int64_t task, int) {
        const auto& c = *static_cast<RowTask<F>*>(p);
        const int64_t end = least(c.rows, (task + 1) * c.rows_per_task);
        for (int64_t i = task * c.rows_per_task; i < end; ++i) c.row(i);
      },
      &context);
  return ok;
}

bool valid(const Activations& a) { return a.h && a.rows > 0 && a.dim > 0; }
bool valid(const Maps& m) { return m.h && m.samples > 0 && m.channels > 0 && m.positions > 0; }

}  // namespace

int goodness_forward(const Activations& in, bool mean, double eps, float* goodness, void* out) {
  if (!valid(in) || !goodness) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h = static_cast<const typename T::type*>(in.h);
    auto* o = static_cast<typename T::type*>(out);
    return for_each_row(in.rows, in.dim, in.threads, [&](int64_t row) {
      const auto* x = h + row * in.stride;
      const double squares = sum_squares<T, R>(x, in.dim);
      goodness[row] = static_cast<float>(mean ? squares / in.dim : squares);
      if (!o) return;
      auto* y = o + row * in.dim;
      const float factor = squares == 0 ? 0.0f : static_cast<float>(1 / (__builtin_sqrt(squares / in.dim) + eps));
      int64_t i = 0;
      for (; i + VW <= in.dim; i += VW) T::store_vector(y + i, get<T, R>(x + i) * splat(factor));
      for (; i < in.dim; ++i) T::put(y + i, get_one<T, R>(x + i) * factor);
    });
  });
}

int goodness_backward(const Activations& in, bool mean, double eps, const float* goodness, const float* grad_goodness,
                      const void* grad_out, void* dh) {
  if (!valid(in) || !goodness || !dh) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h = static_cast<const typename T::type*>(in.h);
    const auto* g_out = static_cast<const typename T::type*>(grad_out);
    auto* d = static_cast<typename T::type*>(dh);
    return for_each_row(in.rows, in.dim, in.threads, [&](int64_t row) {
      const auto* x = h + row * in.stride;
      auto* y = d + row * in.dim;
      // d/da of sum a^2 is 2 a; of a / (r + eps), r = |a| / sqrt(dim), applied to g: g / s - a <g, a> / (s^2 dim r).
      double along_a = grad_goodness ? grad_goodness[row] * (mean ? 2.0 / in.dim : 2.0) : 0.0;
      int64_t i = 0;
      if (!g_out) {
        const float c = static_cast<float>(along_a);
        for (; i + VW <= in.dim; i += VW) {
          const vf a = get<T, R>(x + i);
          T::store_vector(y + i, gate<R>(a, a * splat(c)));
        }
        for (; i < in.dim; ++i) {
          const float a = get_one<T, R>(x + i);
          T::put(y + i, gate_one<R>(a, a * c));
        }
        return;
      }
      const auto* g = g_out + row * in.dim;
      const double r = __builtin_sqrt(mean ? goodness[row] : goodness[row] / static_cast<double>(in.dim));
      const double s = r + eps;
      if (!(r == 0)) along_a -= dot<T, R>(x, g, in.dim) / (s * s * r * in.dim);
      const float c = static_cast<float>(along_a), k = static_cast<float>(1 / s);
      for (; i + VW <= in.dim; i += VW) {
        const vf a = get<T, R>(x + i);
        T::store_vector(y + i, gate<R>(a, T::load_vector(g + i) * splat(k) + a * splat(c)));
      }
      for (; i < in.dim; ++i) {
        const float a = get_one<T, R>(x + i);
        T::put(y + i, gate_one<R>(a, T::get(g + i) * k + a * c));
      }
    });
  });
}

int pair_cosine_forward(const Activations& in, const void* other, int64_t other_stride, const float* target,
                        double margin, double scale, float* loss, float* coefficients, void* out1, void* out2) {
  if (!valid(in) || !other || !target || !loss || !coefficients) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h1 = static_cast<const typename T::type*>(in.h);
    const auto* h2 = static_cast<const typename T::type*>(other);
    auto* d1 = static_cast<typename T::type*>(out1);
    auto* d2 = static_cast<typename T::type*>(out2);
    return for_each_row(in.rows, in.dim, in.threads, [&](int64_t row) {
      const auto *x = h1 + row * in.stride, *y = h2 + row * other_stride;
      const PairSums sums = pair_sums<T, R>(x, y, in.dim);
      const double m1 = sums.squares_1 + PAIR_COSINE_EPS, m2 = sums.squares_2 + PAIR_COSINE_EPS;
      const double product = __builtin_sqrt(m1) * __builtin_sqrt(m2);
      const double cosine = sums.dot / product;
      double w = 0, value = 0;
      if (target[row] == 1) {
        w = -1, value = 1 - cosine;
      } else if (target[row] == -1) {
        w = cosine <= margin ? 0 : 1, value = cosine <= margin ? 0 : cosine - margin;  // NaN passes
      }
      loss[row] = static_cast<float>(value);
      float* c = coefficients + 3 * row;
      c[0] = static_cast<float>(w / product);
      c[1] = static_cast<float>(w * cosine / m1);
      c[2] = static_cast<float>(w * cosine / m2);
      pair_gradients<T, R>(x, y, in.dim, c, scale, d1 ? d1 + row * in.dim : d1, d2 ? d2 + row * in.dim : d2);
    });
  });
}

int pair_cosine_backward(const Activations& in, const void* other, int64_t other_stride, const float* coefficients,
                         const float* grad, void* out1, void* out2) {
  if (!valid(in) || !other || !coefficients || !grad) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h1 = static_cast<const typename T::type*>(in.h);
    const auto* h2 = static_cast<const typename T::type*>(other);
    auto* d1 = static_cast<typename T::type*>(out1);
    auto* d2 = static_cast<typename T::type*>(out2);
    return for_each_row(in.rows, in.dim, in.threads, [&](int64_t row) {
      pair_gradients<T, R>(h1 + row * in.stride, h2 + row * other_stride, in.dim, coefficients + 3 * row, grad[row],
                           d1 ? d1 + row * in.dim : d1, d2 ? d2 + row * in.dim : d2);
    });
  });
}

// --- global average pool ---------------------------------------------------------------------------------------------

namespace {

constexpr int64_t POSITIONS = 64;  // summed in float32 before they join the channel's sum
constexpr int64_t CHANNELS =
    512;  // of a channels-last sample at a time: a block of both stays in the second-level cache

template <class T, bool relu>
double sum_of(const typename T::type* h, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = least(n, i + BLOCK);
    vf s0 = zero(), s1 = zero();
    for (; i + 2 * VW <= end; i += 2 * VW) s0 += get<T, relu>(h + i), s1 += get<T, relu>(h + i + VW);
    float rest = 0;
    for (; i < end; ++i) rest += get_one<T, relu>(h + i);
    total += sum(s0 + s1) + rest;
  }
  return total;
}

// pooled (channels,) = mean over positions of h (positions, channels).
template <class T, bool relu>
void pool_channels_last(const typename T::type* h, int64_t channels, int64_t positions, float* pooled) {
  for (int64_t c = 0; c < channels; ++c) pooled[c] = 0;
  for (int64_t c0 = 0; c0 < channels; c0 += CHANNELS) {
    const int64_t c1 = least(channels, c0 + CHANNELS);
    for (int64_t p0 = 0; p0 < positions; p0 += POSITIONS) {
      const int64_t p1 = least(positions, p0 + POSITIONS);
      int64_t c = c0;
      for (; c + 2 * VW <= c1; c += 2 * VW) {
        vf s0 = zero(), s1 = zero();
        for (int64_t p = p0; p < p1; ++p) {
          s0 += get<T, relu>(h + p * channels + c);
          s1 += get<T, relu>(h + p * channels + c + VW);
        }
        store(pooled + c, load(pooled + c) + s0);
        store(pooled + c + VW, load(pooled + c + VW) + s1);
      }
      for (; c < c1; ++c) {
        float s = 0;
        for (int64_t p = p0; p < p1; ++p) s += get_one<T, relu>(h + p * channels + c);
        pooled[c] += s;
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) pooled[c] /= static_cast<float>(positions);
}

// out (n,) = gate(h, value), the same value everywhere.
template <class T, bool relu>
void spread(const typename T::type* h, int64_t n, float value, typename T::type* out) {
  int64_t i = 0;
  for (; i + VW <= n; i += VW)
    T::store_vector(out + i, relu ? gate<relu>(get<T, relu>(h + i), splat(value)) : splat(value));
  for (; i < n; ++i) T::put(out + i, gate_one<relu>(get_one<T, relu>(h + i), value));
}

// out (positions, width) = gate(h, values), rows of `stride` elements.
template <class T, bool relu>
void spread_rows(const typename T::type* h, int64_t positions, int64_t width, int64_t stride, const float* values,
                 typename T::type* out) {
  for (int64_t p = 0; p < positions; ++p, h += stride, out += stride) {
    int64_t c = 0;
    for (; c + VW <= width; c += VW) {
      const vf value = load(values + c);
      T::store_vector(out + c, relu ? gate<relu>(get<T, relu>(h + c), value) : value);
    }
    for (; c < width; ++c) T::put(out + c, gate_one<relu>(get_one<T, relu>(h + c), values[c]));
  }
}

}  // namespace

int pool_goodness_forward(const Maps& in, bool mean, float* goodness, float* pooled) {
  if (!valid(in) || !goodness || !pooled) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h = static_cast<const typename T::type*>(in.h);
    return for_each_row(in.samples, in.channels * in.positions, in.threads, [&](int64_t sample) {
      const auto* x = h + sample * in.stride;
      float* y = pooled + sample * in.channels;
      if (in.channels_last) {
        pool_channels_last<T, R>(x, in.channels, in.positions, y);
      } else {
        for (int64_t c = 0; c < in.channels; ++c)
          y[c] = static_cast<float>(sum_of<T, R>(x + c * in.positions, in.positions) / in.positions);
      }
      const double squares = sum_squares<Float32, false>(y, in.channels);
      goodness[sample] = static_cast<float>(mean ? squares / in.channels : squares);
    });
  });
}

int pool_goodness_backward(const Maps& in, bool mean, const float* pooled, const float* grad_goodness,
                           const float* grad_pooled, void* dh) {
  if (!valid(in) || !pooled || !dh) return bad_argument;
  return by_type(in.dtype, in.relu, [&](auto type, auto relu) {
    using T = decltype(type);
    constexpr bool R = decltype(relu)::value;
    const auto* h = static_cast<const typename T::type*>(in.h);
    auto* d = static_cast<typename T::type*>(dh);
    const int64_t size = in.channels * in.positions;
    return for_each_row(in.samples, size, in.threads, [&](int64_t sample) {
      const auto* x = h + sample * in.stride;
      auto* y = d + sample * size;
      const float g = grad_goodness ? static_cast<float>(grad_goodness[sample] * (mean ? 2.0 / in.channels : 2.0)) : 0;
      float values[CHANNELS];
      for (int64_t c0 = 0; c0 < in.channels; c0 += CHANNELS) {
        const int64_t width = least(CHANNELS, in.channels - c0);
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = sample * in.channels + c0 + c;
          const float sum = (grad_goodness ? g * pooled[at] : 0.0f) + (grad_pooled ? grad_pooled[at] : 0.0f);
          values[c] = sum / static_cast<float>(in.positions);
        }
        if (in.channels_last) {
          spread_rows<T, R>(x + c0, in.positions, width, in.channels, values, y + c0);
        } else {
          for (int64_t c = 0; c < width; ++c)
            spread<T, R>(x + (c0 + c) * in.positions, in.positions, values[c], y + (c0 + c) * in.positions);
        }
      }
    });
  });
}

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
