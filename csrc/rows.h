// Row-wise work around the similarity kernels, O(rows dim): norms, products with the positives, and what is left of the
// gradient once the pairs are done.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ffcl {

// Rows that may lie in two tensors and may be meant divided by their norms: z_i = x_i / norm_i, in float32.
struct Rows {
  const void* x;  // rows [0, split), elements of `dtype`, unit stride in dim
  int64_t rows, dim, stride;
  DType dtype;
  const void* tail = nullptr;  // rows [split, rows); null: all are in x
  int64_t split = 0, tail_stride = 0;
  const float* norm = nullptr;  // (rows,); null: z = x
};

// norm (rows,) = max(|x_i|, eps) of the rows as they are.
int row_norms(const Rows& x, double eps, int threads, float* norm);

// dot (a.rows,) = <a_i, b_i>; b has at least as many rows.
int row_dots(const Rows& a, const Rows& b, int threads, double* dot);

// grad_i += weight_i z_i. grad (rows, dim) is contiguous here and below.
int add_weighted_rows(const Rows& z, const float* weight, int threads, float* grad);

// Rows in classes: `order` (rows,) lists them class by class, `group` (rows,) is the class of each entry of `order`.
// dot (rows,): sum of <z_i, z_p> over the other rows p of i's class.
int class_dots(const Rows& z, const int64_t* order, const int64_t* group, int threads, double* dot);

// The gradient of sum_i weight_i dot_i: grad_i += sum of (weight_i + weight_p) z_p over the other rows p of i's class.
int add_class_gradient(const Rows& z, const int64_t* order, const int64_t* group, const float* weight, int threads,
                       float* grad);

// How a row's loss follows from x = lse - scale dot / count, the logarithm of its negatives' odds against its positive.
enum class Contrast : int {
  softplus = 0,  // log(1 + e^x): cross-entropy, where lse is of the negatives alone
  decoupled = 1,  // x, and 0 for a row without negatives
  mean = 2,  // SupCon: x over the mean of `count` positives, softplus for one positive, 0 for none
};

// ids (rows,): equal for the two rows of a class of two, else every row's own. count (rows,): the other rows of the
// class; may be null.
int class_ids(int64_t rows, const int64_t* order, const int64_t* group, int64_t* ids, float* count);

// loss (n,) and slope (n,) = dloss/dx; loss is added to where `add`. `count` only for Contrast::mean, else null. An
// infinite scale dot is an overflow of the inputs: NaN, as in a softmax, and not a loss of 0.
int contrast_losses(int64_t n, const float* lse, const double* dot, const float* count, double scale, Contrast kind,
                    bool add, float* loss, float* slope);

// From the gradient of the losses: row_grad, col_grad (if col_slope) of the normalisers, and weight of the dots.
int contrast_weights(int64_t n, const float* grad, const float* slope, const float* col_slope, const float* count,
                     double scale, float* row_grad, float* col_grad, float* weight);

// inner (rows,) = <z_i, grad_i>; then, where z has norms, grad turns in place from the gradient of z into that of x:
// (grad_i - z_i inner_i) / norm_i, without the projection where the norm is not above eps.
int finish_gradient(const Rows& z, double eps, int threads, float* grad, double* inner);

}  // namespace ffcl
