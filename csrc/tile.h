// Register tiles of a matrix product, and the packed layouts they read: shared by the CPU similarity kernels.
//
// A tile is MR x NR float32 accumulators (12 of AVX2's 16 registers, 24 of AVX-512's 32). Each step of the inner
// dimension loads NR values of B and broadcasts MR values of A: 2 loads and MR broadcasts for 2 MR fused
// multiply-adds, so the multiply-add units are the limit as long as both operands come from L1 or stream from L2.
#pragma once

#include <cstdlib>

#include "parallel.h"
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

// Group of `width` rows, dimension by dimension: out[d * width + w] = x[first + w, d].
template <class T>
void pack_group_by_dim(const typename T::type* x, int64_t stride, int64_t rows, int64_t dim, int64_t first, int width,
                       float* out) {
  const int64_t valid = larger(0, smaller(width, rows - first));
  for (int64_t w = 0; w < valid; ++w) {
    const typename T::type* row = x + (first + w) * stride;
    for (int64_t d = 0; d < dim; ++d) out[d * width + w] = T::get(row + d);
  }
  for (int64_t w = valid; w < width; ++w)
    for (int64_t d = 0; d < dim; ++d) out[d * width + w] = 0;
}

// All dims of row `i` into panels of `width` dims: out[(d / width) * panel + i * width + d % width] = x[i, d].
template <class T>
void pack_row_by_panel(const typename T::type* x, int64_t stride, int64_t rows, int64_t dim, int64_t i, int width,
                       int64_t panel, float* out) {
  const typename T::type* row = x + i * stride;
  for (int64_t p = 0; p * width < dim; ++p) {
    float* to = out + p * panel + i * width;
    const int64_t valid = i < rows ? smaller(width, dim - p * width) : 0;
    for (int64_t w = 0; w < valid; ++w) to[w] = T::get(row + p * width + w);
    for (int64_t w = valid; w < width; ++w) to[w] = 0;
  }
}

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
