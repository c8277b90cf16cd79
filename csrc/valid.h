// What the CPU kernels may rely on; cpu_dispatch.cpp refuses the rest with bad_argument before anything is read.
// Buffers cannot be checked: their addresses must hold what sizes and strides say.
#pragma once

#include <cstdint>

#include "goodness.h"
#include "similarity.h"

namespace ffcl {

inline bool valid(DType dtype) { return dtype >= DType::float32 && dtype <= DType::float16; }

// Whether `rows` rows of `dim` elements, `stride` elements apart, can be addressed.
inline bool valid_rows(const void* x, int64_t rows, int64_t dim, int64_t stride) {
  int64_t end, dense, bytes;
  return x && rows > 0 && dim > 0 && stride >= 0 && !__builtin_mul_overflow(rows - 1, stride, &end) &&
         !__builtin_mul_overflow(rows, dim, &dense) && !__builtin_add_overflow(end, dense, &end) &&
         !__builtin_mul_overflow(end, 8, &bytes) && !__builtin_mul_overflow(dense, 8, &bytes);
}

inline bool valid(const Rows& r) {
  if (!valid(r.dtype)) return false;
  if (!r.tail) return valid_rows(r.x, r.rows, r.dim, r.stride);
  return r.split > 0 && r.split < r.rows && valid_rows(r.x, r.split, r.dim, r.stride) &&
         valid_rows(r.tail, r.rows - r.split, r.dim, r.tail_stride) && valid_rows(r.x, r.rows, r.dim, 0);
}

inline bool valid(const Similarity& s) {
  const bool by_id = s.exclude != Exclude::none && s.exclude != Exclude::diagonal;
  return s.exclude >= Exclude::none && s.exclude <= Exclude::different_id && valid(s.queries()) &&
         (!s.k || valid_rows(s.k, s.cols, s.dim, s.k_stride)) && (!by_id || (s.row_ids && (!s.k || s.col_ids)));
}

// Whether a cache, where there is one, holds the normalisers at least.
inline bool valid_cache(const Similarity& s, const float* cache, int64_t size) {
  return !cache || size >= 16 + 2 * (s.rows + (s.k ? s.cols : 0));
}

inline bool valid(const Activations& a) { return valid(a.dtype) && valid_rows(a.h, a.rows, a.dim, a.stride); }

inline bool valid(const Maps& m) {
  int64_t size;
  return valid(m.dtype) && m.channels > 0 && m.positions > 0 &&
         !__builtin_mul_overflow(m.channels, m.positions, &size) && valid_rows(m.h, m.samples, size, m.stride);
}

}  // namespace ffcl
