// Calls what rows.h and similarity.h have, in order. Compiled once, for every processor.
#include "contrast.h"

#include <cstring>
#include <memory>
#include <new>

#include "valid.h"

namespace ffcl {
namespace {

bool valid(const ContrastLoss& loss) {
  Similarity s = loss.pairs;
  if (loss.kind == Contrast::mean) s.row_ids = loss.order;  // which the ids will be made of
  if (!valid(s) || s.q_norm || s.k_norm || loss.kind < Contrast::softplus || loss.kind > Contrast::mean) return false;
  if (loss.both && (!s.k || s.cols != s.rows)) return false;
  if (loss.order) return loss.group && !s.k && !loss.positive;
  if (!s.k || loss.kind == Contrast::mean) return false;
  return loss.positive ? valid_rows(loss.positive, s.rows, s.dim, loss.positive_stride) : s.cols == s.rows;
}

// A valid loss's operands as the kernels take them, and where its state has what. F: float or const float.
template <class F>
struct Operands {
  Operands(const ContrastLoss& loss, F* state, int64_t state_size) : pairs(loss.pairs) {
    const int64_t rows = pairs.rows;
    int64_t used = 0;
    const auto next = [&](bool wanted, int64_t size) {
      F* const here = wanted ? state + used : nullptr;
      used += wanted ? size : 0;
      return here;
    };
    q_norm = next(loss.unit_q, rows);
    k_norm = next(loss.unit_k && pairs.k, pairs.cols);
    positive_norm = next(loss.unit_q && loss.positive, rows);
    row_lse = next(true, rows), row_slope = next(true, rows);
    col_lse = next(loss.both, rows), col_slope = next(loss.both, rows);
    used = (used + 15) / 16 * 16;
    fits = state && used <= state_size;
    cache_size = fits ? state_size - used : 0;
    cache = cache_size ? state + used : nullptr;
    pairs.q_norm = q_norm, pairs.k_norm = k_norm;
    q = pairs.queries();
    positive = pairs.keys();  // nobody reads it where there are classes
    if (loss.positive)
      positive = {loss.positive, rows, pairs.dim, loss.positive_stride, pairs.dtype, nullptr, 0, 0, positive_norm};
  }
  Similarity pairs;
  Rows q, positive;
  bool fits;
  F *q_norm, *k_norm, *positive_norm, *row_lse, *row_slope, *col_lse, *col_slope, *cache;
  int64_t cache_size;
};

template <class T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[static_cast<size_t>(size)]);
}

}  // namespace

#define FFCL_TRY(call)                          \
  do {                                          \
    if (const int status = call) return status; \
  } while (false)

int contrast_forward(const ContrastLoss& loss, float* state, int64_t state_size, float* count, float* out) {
  const bool mean = loss.kind == Contrast::mean;
  if (!valid(loss) || (count != nullptr) != mean || !out) return bad_argument;
  Operands o(loss, state, state_size);
  if (!o.fits) return bad_argument;
  const int64_t rows = o.pairs.rows;
  const int threads = o.pairs.threads;
  const auto dot = scratch<double>(rows);
  const auto ids = scratch<int64_t>(mean ? rows : 0);
  if (!dot || !ids) return out_of_memory;
  if (o.q_norm) FFCL_TRY(row_norms(o.q, loss.eps, threads, o.q_norm));
  if (o.k_norm) FFCL_TRY(row_norms(o.pairs.keys(), loss.eps, threads, o.k_norm));
  if (o.positive_norm) FFCL_TRY(row_norms(o.positive, loss.eps, threads, o.positive_norm));
  if (mean) {
    FFCL_TRY(class_ids(rows, loss.order, loss.group, ids.get(), count));
    o.pairs.row_ids = ids.get();
  }
  FFCL_TRY(similarity_forward(o.pairs, o.row_lse, o.col_lse, o.cache, o.cache_size));
  if (loss.order)
    FFCL_TRY(class_dots(o.q, loss.order, loss.group, threads, dot.get()));
  else
    FFCL_TRY(row_dots(o.q, o.positive, threads, dot.get()));
  const double scale = o.pairs.scale;
  FFCL_TRY(contrast_losses(rows, o.row_lse, dot.get(), count, scale, loss.kind, false, out, o.row_slope));
  if (!loss.both) return ok;
  return contrast_losses(rows, o.col_lse, dot.get(), count, scale, loss.kind, true, out, o.col_slope);
}

int contrast_backward(const ContrastLoss& loss, const float* state, int64_t state_size, const float* count,
                      const float* grad, float* dq, float* dk, float* d_positive, float* d_scale) {
  const bool mean = loss.kind == Contrast::mean;
  if (!valid(loss) || (count != nullptr) != mean || !grad || (d_scale && !dq) || (dk && !loss.pairs.k) ||
      (d_positive && !loss.positive))
    return bad_argument;
  Operands o(loss, state, state_size);
  if (!o.fits) return bad_argument;
  const int64_t rows = o.pairs.rows, cols = o.pairs.k ? o.pairs.cols : rows;
  const int threads = o.pairs.threads;
  const auto shares = scratch<float>(3 * rows);
  const auto inner = scratch<double>(rows > cols ? rows : cols);
  const auto ids = scratch<int64_t>(mean ? rows : 0);
  if (!shares || !inner || !ids) return out_of_memory;
  float *row_grad = shares.get(), *weight = row_grad + rows, *col_grad = loss.both ? weight + rows : nullptr;
  FFCL_TRY(contrast_weights(rows, grad, o.row_slope, o.col_slope, count, o.pairs.scale, row_grad, col_grad, weight));
  if (mean) {
    FFCL_TRY(class_ids(rows, loss.order, loss.group, ids.get(), nullptr));
    o.pairs.row_ids = ids.get();
  }
  if (dq || dk)
    FFCL_TRY(similarity_backward(o.pairs, o.row_lse, o.col_lse, row_grad, col_grad, o.cache, o.cache_size, dq, dk));
  if (loss.order) {
    if (dq) FFCL_TRY(add_class_gradient(o.q, loss.order, loss.group, weight, threads, dq));
  } else {
    if (dq) FFCL_TRY(add_weighted_rows(o.positive, weight, threads, dq));
    if (d_positive) std::memset(d_positive, 0, sizeof(float) * static_cast<size_t>(rows * o.pairs.dim));
    if (float* const to = loss.positive ? d_positive : dk) FFCL_TRY(add_weighted_rows(o.q, weight, threads, to));
  }
  if (dk && o.k_norm) FFCL_TRY(finish_gradient(o.pairs.keys(), loss.eps, threads, dk, inner.get()));
  if (d_positive && o.positive_norm) FFCL_TRY(finish_gradient(o.positive, loss.eps, threads, d_positive, inner.get()));
  if (dq && (o.q_norm || d_scale)) FFCL_TRY(finish_gradient(o.q, loss.eps, threads, dq, inner.get()));
  if (!d_scale) return ok;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += inner[static_cast<size_t>(i)];
  // In self-similarity q takes the part of both sides of each product.
  *d_scale = static_cast<float>(total / (o.pairs.k ? o.pairs.scale : 2.0 * o.pairs.scale));
  return ok;
}

}  // namespace ffcl
