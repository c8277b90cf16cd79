// Goodness on CUDA devices: the sum or mean of squares of each row, the normalised row, and their gradient.
// See ffcl_fast/ops.py for the operators. No GPU is needed to link or to load what is declared here.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ffcl {

struct GoodnessRows {
  const void* h;              // (rows, dim), elements of `dtype`, unit stride in dim
  int64_t rows, dim, stride;  // stride: elements between rows
  DType dtype;
  bool relu;                  // a = max(h, 0), else a = h
  bool mean;                  // goodness is the mean of a^2 over dim, else the sum
  float eps;
  int device;                 // CUDA ordinal
  void* stream;               // cudaStream_t
};

// goodness (rows,); out (rows, dim) of `dtype`, dense, or null: a / (sqrt(mean a^2) + eps).
int goodness_forward_cuda(const GoodnessRows&, float* goodness, void* out);

// dh (rows, dim) of `dtype`, dense. goodness as the forward pass wrote it; grad_goodness (rows,) or null;
// grad_out (rows, dim) of `dtype`, dense, or null.
int goodness_backward_cuda(const GoodnessRows&, const float* goodness, const float* grad_goodness,
                           const void* grad_out, void* dh);

// CUDA's words for a status of one of the functions above: cuda_error_base + cudaError_t.
const char* cuda_error(int status);

}  // namespace ffcl
