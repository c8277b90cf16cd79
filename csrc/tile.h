// Register tiles of a matrix product, and the packed layouts they read: shared by the CPU similarity kernels.
//
// A tile is MR x NR float32 accumulators (12 of AVX2's 16 registers, 24 of AVX-512's 32). Each step of the inner
// dimension loads NR values of B and broadcasts MR values of A: 2 loads and MR broadcasts for 2 MR fused
// multiply-adds, so the multiply-add units are the limit as long as both operands come from L1 or stream from L2.
#pragma once

#include <cstdlib>

#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace ffcl {
namespace FFCL_ISA_NS {

constexpr int MR = VW == 16 ? 12 : 6;
constexpr int NR = 2 * VW;
constexpr int64_t ROW_TASK = 96;  // rows a thread takes at a time: a multiple of MR and NR for every instruction set
static_assert(ROW_TASK % MR == 0 && ROW_TASK % NR == 0, "blocks must hold whole tiles");

FFCL_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
FFCL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FFCL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cache-line aligned scratch memory.
template <class T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(int64_t count) {
    if (count > 0) data = static_cast<T*>(aligned_alloc(64, static_cast<size_t>(round_up(count * sizeof(T), 64))));
    failed = count > 0 && !data;
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data; }
  bool failed;
};

template <class F>
void parallel(int64_t tasks, int threads, F&& body) {
  run_tasks(
      tasks, threads, [](void* f, int64_t i, int thread) { (*static_cast<F*>(f))(i, thread); }, &body);
}

// Rows of one storage type.
template <class T>
struct Source {
  typedef typename T::type type;
  const type *x, *tail;
  int64_t dim, stride, split, tail_stride;
  const float* norm;
  explicit Source(const Rows& r)
      : x(static_cast<const type*>(r.x)),
        tail(static_cast<const type*>(r.tail)),
        dim(r.dim),
        stride(r.stride),
        split(r.tail ? r.split : r.rows),
        tail_stride(r.tail_stride),
        norm(r.norm) {}
  FFCL_INLINE const type* row(int64_t i) const { return i < split ? x + i * stride : tail + (i - split) * tail_stride; }
  FFCL_INLINE float get(int64_t i, const type* element) const {
    return norm ? T::get(element) / norm[i] : T::get(element);
  }
  // out = z[i, d : d + n] in float32.
  FFCL_INLINE void read(int64_t i, int64_t d, int64_t n, float* out) const {
    const type* from = row(i) + d;
    if (norm)
      for (int64_t l = 0; l < n; ++l) out[l] = T::get(from + l) / norm[i];
    else
      for (int64_t l = 0; l < n; ++l) out[l] = T::get(from + l);
  }
};

template <class F>
FFCL_INLINE void by_type(const Rows& r, F&& f) {
  if (r.dtype == DType::float32)
    f(Source<Float32>(r), Float32{});
  else if (r.dtype == DType::bfloat16)
    f(Source<BFloat16>(r), BFloat16{});
  else
    f(Source<Float16>(r), Float16{});
}

struct Tile {
  vf x[MR][2];
};

FFCL_INLINE void clear(Tile& c) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] = c.x[r][1] = zero();
}
FFCL_INLINE void load_tile(Tile& c, const float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] = load(p + r * stride), c.x[r][1] = load(p + r * stride + VW);
}
FFCL_INLINE void add_tile(Tile& c, const float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] += load(p + r * stride), c.x[r][1] += load(p + r * stride + VW);
}
FFCL_INLINE void scale_tile(Tile& c, vf factor) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] *= factor, c.x[r][1] *= factor;
}
FFCL_INLINE void store_tile(const Tile& c, float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) store(p + r * stride, c.x[r][0]), store(p + r * stride + VW, c.x[r][1]);
}

// c += A B over `depth` steps. A: element (r, d) at a[r * a_row + d * a_step]; B: (d, j) at b[d * NR + j].
template <int64_t a_row, int64_t a_step>
FFCL_INLINE void multiply(Tile& c, const float* a, const float* b, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d, a += a_step, b += NR) {
    const vf b0 = load(b), b1 = load(b + VW);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf x = splat(a[r * a_row]);
      c.x[r][0] += x * b0;
      c.x[r][1] += x * b1;
    }
  }
}

// Packed copies in float32, zero-padded -------------------------------------------------------------------------------

// Group of `width` rows, dimension by dimension: out[d * width + w] = x[first + w, d]. Rows from `end` on are zero. By
// blocks of dimensions, whose lines of `out` stay in L1 while the rows write their columns of it.
template <int width, class T>
void pack_group_by_dim(const Source<T>& x, int64_t first, int64_t end, float* out) {
  constexpr int64_t block = 64;
  const int64_t valid = larger(0, smaller(width, end - first));
  for (int64_t d0 = 0; d0 < x.dim; d0 += block, out += block * width) {
    const int64_t n = smaller(block, x.dim - d0);
    for (int64_t w = 0; w < valid; ++w) {
      alignas(64) float row[block];
      x.read(first + w, d0, n, row);
      for (int64_t l = 0; l < n; ++l) out[l * width + w] = row[l];
    }
    for (int64_t w = valid; w < width; ++w)
      for (int64_t l = 0; l < n; ++l) out[l * width + w] = 0;
  }
}

// All dims of row i into panels of `width` dims: out[(d / width) * panel + d % width] = x[i, d]; zero from `end` on.
template <int width, class T>
void pack_row_by_panel(const Source<T>& x, int64_t i, int64_t end, int64_t panel, float* out) {
  for (int64_t d = 0; d < x.dim; d += width, out += panel) {
    const int64_t valid = i < end ? smaller(width, x.dim - d) : 0;
    if (valid > 0) x.read(i, d, valid, out);
    for (int64_t w = valid; w < width; ++w) out[w] = 0;
  }
}

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
