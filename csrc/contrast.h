// A whole contrastive loss over the similarity kernels in one call each way: norms, normalisers, positives, losses and
// all of their gradients. See ffcl_fast/ops.py for the operators.
#pragma once

#include <cstdint>

#include "rows.h"
#include "similarity.h"

namespace ffcl {

// Each row's positive is row i of `positive`, or the other rows of its class, or where there is neither row i of k.
struct ContrastLoss {
  Similarity pairs;  // without norms
  const void* positive;  // (rows, dim) of the dtype of q, or null
  int64_t positive_stride;
  const int64_t *order, *group;  // classes as in rows.h, or null; k and positive are null with them
  bool unit_q, unit_k;  // divide the rows of q, its tail and positive, and those of k, by max(their length, eps)
  double eps;
  bool both;  // add the losses of the columns; cols must be rows
  Contrast kind;  // for mean, with classes, row_ids are made of those and `exclude` must be same_id
};

// Both passes take the same two buffers: the first writes and the second reads them.
// state: `state_size` floats: the norms that are asked for of q with its tail, of k and of positive; the rows'
// normalisers
//   and slopes (rows.h) and, with `both`, the columns'; what is left of them after the end of a line of 16 floats is
//   the cache of similarity.h.
// count: (rows,), the number of each row's positives; null unless `kind` is mean.

// loss (rows,).
int contrast_forward(const ContrastLoss&, float* state, int64_t state_size, float* count, float* loss);

// From grad (rows,), the gradient of `loss`: dq (rows, dim), dk (cols, dim) and d_positive (rows, dim), contiguous
// float32, of x where rows are divided; and d_scale (1,), which needs dq. Each may be null.
int contrast_backward(const ContrastLoss&, const float* state, int64_t state_size, const float* count,
                      const float* grad, float* dq, float* dk, float* d_positive, float* d_scale);

}  // namespace ffcl
