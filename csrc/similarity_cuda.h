// Contrastive similarity on CUDA devices, for float16 and bfloat16; the mathematics is in similarity.h.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ffcl {

enum class SimilarityWay : int { sm80 = 0, sm90 = 1 };  // mma and cp.async, or wgmma and TMA (compute capability 9.0)

struct SimilarityCuda {
  const void *q, *k;  // (rows, dim), (cols, dim), elements of `dtype`, 16-byte aligned; k = q where triangle
  int64_t rows, cols, dim;  // dim: a multiple of 8, 4096 at most
  int64_t q_stride, k_stride;  // elements between rows: multiples of 8
  DType dtype;
  const float* scale;  // on the device
  const int64_t *row_ids, *col_ids;
  int exclude;  // ffcl::Exclude
  bool triangle;  // k = q: S is symmetric and only its upper half is computed
  SimilarityWay way;
  int device;
  void* stream;
};

// Whether this build has SimilarityWay::sm90.
bool sm90_built();

// Floats of workspace that similarity_forward_cuda needs; -1 where it would refuse the arguments.
int64_t similarity_workspace_cuda(const SimilarityCuda&);

// row_lse (rows,) and, if not null, col_lse (cols,); not for triangle. See similarity.h. rests, if not null: what
// rounding took from each of them; those of columns, where there is col_lse, after those of rows.
int similarity_forward_cuda(const SimilarityCuda&, float* row_lse, float* col_lse, float* rests, float* workspace,
                            int64_t size);

// A side's normalisers, what rounding took from them (or null), and the gradient of the normalisers, (n,) each; vectors
// (3, n): weight, shift, and weight 2^(centre - shift), as the panels read them.
struct Normalisers {
  const float *lse, *rests, *grad;
  int64_t n;
  float* vectors;
};

constexpr int VECTOR_RANGES = 128;

// The vectors of rows and of columns (n = 0: none), and frame (3,): the centre that they share; 1 where one exponential
// 2^(t - centre) may serve both sides, or 0; and scale unit / gain, so that dq = frame[2] G k. A weight is its gradient
// by gain / unit: the unit is the largest finite gradient of both sides, or gain 2^-126 if that is more (1 where all
// are 0), so that weights are about gain at most. scale (1,), on the device; ranges: 3 VECTOR_RANGES floats of
// workspace.
int similarity_vectors_cuda(const Normalisers& rows, const Normalisers& cols, const float* scale, double gain,
                            float* ranges, float* frame, int device, void* stream);

// panel (row_end - row_begin, col_end - col_begin) of `dtype`, panel_stride elements between rows (a multiple of 8, and
// at least the width rounded up to 8): G_ij = 2^(t_ij - shift_i) weight_i + 2^(t_ij - shift_j) weight_j, t = S log2 e,
// each power at most 1 unless one serves both, 0 where the pair is left out. row_vectors (3, rows), frame and, or null
// for no second term, col_vectors (3, cols): see above.
int similarity_panel_cuda(const SimilarityCuda&, const float* row_vectors, const float* col_vectors, const float* frame,
                          int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end, void* panel,
                          int64_t panel_stride);

}  // namespace ffcl
