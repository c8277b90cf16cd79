// Goodness on CUDA devices. See ffcl_fast/ops.py for the operators. No GPU is needed to link or to load what is
// declared here. Every function returns a Status, or cuda_error_base + cudaError_t.
#pragma once

#include <cstdint>

#include "cuda_plan.h"
#include "isa.h"

namespace ffcl {

struct GoodnessRows {
  const void* h;              // (rows, dim), elements of `dtype`, unit stride in dim
  int64_t rows, dim, stride;  // stride: elements between rows
  DType dtype;
  bool relu;  // a = max(h, 0), else a = h
  bool mean;  // goodness is the mean of a^2 over dim, else the sum
  float eps;
  int device;    // CUDA ordinal
  void* stream;  // cudaStream_t
};

struct GoodnessMany {
  ManyLayers layers;  // h, dh, rows, stride, dim and first_row (of the results) of each
  DType dtype;
  bool relu, mean;
  int device;
  void* stream;
};

struct PairRows {
  const void *h1, *h2;  // (rows, dim), elements of `dtype`, unit stride in dim
  int64_t rows, dim, stride_1, stride_2;
  DType dtype;
  bool relu;
  int device;
  void* stream;
};

struct PoolMaps {
  const void* h;  // a sample is (channels, positions), or (positions, channels) where channels_last; dense
  int64_t samples, channels, positions;
  int64_t stride;  // elements between samples
  bool channels_last;
  DType dtype;
  bool relu, mean;
  int device;
  void* stream;
};

// goodness (rows,); out (rows, dim) of `dtype`, dense, or null: a / (sqrt(mean a^2) + eps).
int goodness_forward_cuda(const GoodnessRows&, float* goodness, void* out);

// dh (rows, dim) of `dtype`, dense. goodness as the forward pass wrote it; grad_goodness (rows,) or null;
// grad_out (rows, dim) of `dtype`, dense, or null.
int goodness_backward_cuda(const GoodnessRows&, const float* goodness, const float* grad_goodness, const void* grad_out,
                           void* dh);

// goodness (all rows of all layers,), and dh of every layer from its gradient.
int goodness_many_cuda(const GoodnessMany&, float* goodness);
int goodness_many_backward_cuda(const GoodnessMany&, const float* grad_goodness);

// As goodness.h's pair_cosine_forward and pair_cosine_backward. d1, d2 (rows, dim) of `dtype`, dense, or null.
int pair_cosine_forward_cuda(const PairRows&, const float* target, float margin, float scale, float* loss,
                             float* coefficients, void* d1, void* d2);
int pair_cosine_backward_cuda(const PairRows&, const float* coefficients, const float* grad, void* d1, void* d2);

// x (size,) of dtype *= *factor, a float on the device; nothing is read or written where it is 1.
int scale_cuda(void* x, int64_t size, DType dtype, const float* factor, int device, void* stream);

// As goodness.h's pool_goodness_forward and pool_goodness_backward.
int pool_goodness_forward_cuda(const PoolMaps&, float* goodness, float* pooled);
int pool_goodness_backward_cuda(const PoolMaps&, const float* pooled, const float* grad_goodness,
                                const float* grad_pooled, void* dh);

// CUDA's words for a status of one of the functions above.
const char* cuda_error(int status);

}  // namespace ffcl
