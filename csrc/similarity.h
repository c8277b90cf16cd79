// Contrastive similarity without the similarity matrix: what the CPU and CUDA kernels compute.
//
// S_ij = scale * <q_i, k_j>, i < rows, j < cols, never stored whole. See ffcl_fast/ops.py for the operators.
// `k == nullptr` means k = q: S is symmetric and only pairs on or above the diagonal are computed.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace ffcl {

enum class Exclude : int { none = 0, diagonal = 1, same_id = 2, same_id_off_diagonal = 3, different_id = 4 };

struct Similarity {
  const void* q;           // (rows, dim), elements of `dtype`, unit stride in dim
  const void* k;           // (cols, dim) or null
  int64_t rows, cols, dim;
  int64_t q_stride, k_stride;  // elements between rows
  DType dtype;
  float scale;
  const int64_t* row_ids;  // (rows,) or null
  const int64_t* col_ids;  // (cols,) or null
  Exclude exclude;
  int threads;
  // Where given, rows are divided by these: S is of q_i / q_norm_i and k_j / k_norm_j.
  const float* q_norm = nullptr;  // (rows,)
  const float* k_norm = nullptr;  // (cols,)
  // Where given, rows from `q_split` on are those of q_tail (rows - q_split, dim): two views as one without a copy.
  const void* q_tail = nullptr;
  int64_t q_split = 0, q_tail_stride = 0;

  Rows queries() const { return {q, rows, dim, q_stride, dtype, q_tail, q_split, q_tail_stride, q_norm}; }
  Rows keys() const { return k ? Rows{k, cols, dim, k_stride, dtype, nullptr, 0, 0, k_norm} : queries(); }
};

// row_lse (rows,) and, if not null, col_lse (cols,): natural logarithms of the sums of exponentials; col_lse is not
// written for k = null.
// cache: null, or `cache_size` >= 16 + 2 (rows + (k ? cols : 0)) floats that let similarity_backward skip work: the
// normalisers at full precision and, in what is left, as many panels of exp(S) as fit. A backward without it is right,
// only slower.
int similarity_forward(const Similarity&, float* row_lse, float* col_lse, float* cache, int64_t cache_size);

// dq (rows, dim) and dk (cols, dim), the gradients of the (divided) rows, contiguous float32, either may be null (dk
// must be where k is; dq is needed then). col_grad and col_lse may be null: no gradient from the columns.
int similarity_backward(const Similarity&, const float* row_lse, const float* col_lse, const float* row_grad,
                        const float* col_grad, const float* cache, int64_t cache_size, float* dq, float* dk);

// loss (1,) and dbias (1,), dq and dk as above or null for the loss alone. `positives`: z_ii = +1, else all -1.
int siglip(const Similarity&, float bias, bool positives, float* loss, float* dbias, float* dq, float* dk);

}  // namespace ffcl
