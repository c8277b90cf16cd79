// Goodness of activations: what the CPU and CUDA kernels compute. See ffcl_fast/ops.py for the operators.
//
// a = max(h, 0) where `relu` (h is then a pre-activation), else a = h; a NaN stays a NaN.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ffcl {

constexpr double PAIR_COSINE_EPS = 1e-12;  // added to the squared norms

struct Activations {
  const void* h;      // (rows, dim), elements of `dtype`, unit stride in dim
  int64_t rows, dim;
  int64_t stride;     // elements between rows
  DType dtype;
  bool relu;
  int threads;
};

struct Maps {
  const void* h;      // a sample is (channels, positions), or (positions, channels) where channels_last; dense
  int64_t samples, channels, positions;
  int64_t stride;     // elements between samples
  bool channels_last;
  DType dtype;
  bool relu;
  int threads;
};

// goodness (rows,) = sum_j a_j^2, or the mean where `mean`.
// out: null or (rows, dim) of dtype, contiguous: a / (|a| / sqrt(dim) + eps); zero where all of a is.
int goodness_forward(const Activations&, bool mean, double eps, float* goodness, void* out);

// dh (rows, dim) of dtype, contiguous. grad_goodness (rows,) and grad_out (rows, dim) of dtype, contiguous; null is
// zero.
int goodness_backward(const Activations&, bool mean, double eps, const float* goodness, const float* grad_goodness,
                      const void* grad_out, void* dh);

// cos = <a1, a2> / (n1 n2), n^2 = |a|^2 + PAIR_COSINE_EPS. target, loss (rows,): 1 - cos where target = 1,
// max(0, cos - margin) where it is -1, else 0. With w = dloss/dcos, coefficients (rows, 3) = w / (n1 n2), w cos / n1^2,
// w cos / n2^2. d1, d2: null or (rows, dim) of dtype, contiguous: scale * dloss/dh.
int pair_cosine_forward(const Activations& h1, const void* h2, int64_t h2_stride, const float* target, double margin,
                        double scale, float* loss, float* coefficients, void* d1, void* d2);

// d1 = grad (c0 a2 - c1 a1) and d2 = grad (c0 a1 - c2 a2), each zero where relu cut its h; either may be null.
int pair_cosine_backward(const Activations& h1, const void* h2, int64_t h2_stride, const float* coefficients,
                         const float* grad, void* d1, void* d2);

// pooled (samples, channels) = mean of a over the positions; goodness (samples,) = sum or mean over channels of
// pooled^2.
int pool_goodness_forward(const Maps&, bool mean, float* goodness, float* pooled);

// dh: dense, in h's order. grad_goodness (samples,), grad_pooled (samples, channels): null is zero.
int pool_goodness_backward(const Maps&, bool mean, const float* pooled, const float* grad_goodness,
                           const float* grad_pooled, void* dh);

}  // namespace ffcl
