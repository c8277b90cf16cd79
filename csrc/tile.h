// Register tiles of a matrix product, and the packed layouts they read: shared by the CPU similarity kernels.
//
// A tile is MR x NR float32 accumulators (12 of AVX2's 16 registers, 24 of AVX-512's 32). Each step of the inner
// dimension loads NR values of B and broadcasts MR values of A: 2 loads and MR broadcasts for 2 MR fused
// multiply-adds, so the multiply-add units are the limit as long as both operands come from L1 or stream from L2.
//
// Compiled with FFCL_BF16_PAIRS, for bfloat16 rows alone, a packed operand is a word of two bfloat16 that follow each
// other along the dimension summed over, and a step of a tile takes both: half the steps and half the bytes. With
// FFCL_AMX as well the tile is 32 x 32, in the processor's tile registers, and a step takes 16 words (tile_amx.h).
#pragma once

#include <cstring>
#include <utility>

#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace ffcl {
namespace FFCL_ISA_NS {

#ifdef FFCL_AMX
constexpr int MR = 32;
#else
constexpr int MR = VW == 16 ? 12 : 6;
#endif
constexpr int NR = 2 * VW;
constexpr int64_t ROW_TASK = 96;  // rows of a product that a thread takes at a time: a multiple of every MR and NR
static_assert(ROW_TASK % MR == 0 && ROW_TASK % NR == 0, "blocks must hold whole tiles");

#ifdef FFCL_BF16_PAIRS
typedef int32_t Word;
typedef vi Words;
constexpr int64_t PER_WORD = 2;
#else
typedef float Word;
typedef vf Words;
constexpr int64_t PER_WORD = 1;
#endif
#ifdef FFCL_AMX
constexpr int64_t STEP = 16;  // words along the dimension summed over that a tile takes at a time
constexpr bool PREFETCHES = false;
#else
constexpr int64_t STEP = 1;
constexpr bool PREFETCHES = true;
#endif
static_assert(MR % 2 == 0, "pairs of rows must not straddle tiles");

FFCL_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
FFCL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FFCL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cache-line aligned scratch memory.
template <class T>
struct Buffer {
  T* data = nullptr;
  const size_t bytes;
  explicit Buffer(int64_t count) : bytes(count > 0 ? static_cast<size_t>(count) * sizeof(T) : 0) {
    if (bytes) data = static_cast<T*>(take_scratch(bytes));
    failed = bytes && !data;
  }
  ~Buffer() { give_scratch(data, bytes); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data; }
  bool failed;
};

template <class F>
void parallel(int64_t tasks, int threads, F&& body) {
  run_tasks(tasks, threads, [](void* f, int64_t i, int thread) { (*static_cast<F*>(f))(i, thread); }, &body);
}

// Rows divided by norms, in bfloat16: a power of two is exact there, so rows are packed divided by that of their norm,
// and the rest of the division, the row's unit, waits for the products in float32. It lies in (1/2, 1] but for norms
// that are subnormal or above 2^127.
FFCL_INLINE float inverse_power(float norm) {
  uint32_t bits;
  __builtin_memcpy(&bits, &norm, 4);
  bits = 0x7f000000u - (bits & 0x7f800000u);
  bits = bits < 0x00800000u || bits > 0x7f000000u ? 0x00800000u : bits;  // beyond 2^127, and not finite
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FFCL_INLINE float unit(float norm) { return 1 / (norm * inverse_power(norm)); }

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
  FFCL_INLINE float norm_of(int64_t i) const { return norm ? norm[i] : 1.0f; }
  // z[i] at `element` but for the unit of row i (below), which bfloat16 holds without rounding.
  FFCL_INLINE uint16_t get_bf16(int64_t i, const type* element) const {
    return norm ? float_to_bf16(T::get(element) * inverse_power(norm[i])) : *element;
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
#ifdef FFCL_BF16_PAIRS
  f(Source<BFloat16>(r), BFloat16{});
#else
  if (r.dtype == DType::float32)
    f(Source<Float32>(r), Float32{});
  else if (r.dtype == DType::bfloat16)
    f(Source<BFloat16>(r), BFloat16{});
  else
    f(Source<Float16>(r), Float16{});
#endif
}

// Asks for the lines of these bytes ahead of their use: what comes next in L3 is not what the hardware's prefetchers
// expect, at the end of a page or where rows of a tile lie far apart. Not for AMX, whose loads fill the queue of misses
// by themselves: these would wait in front of them, a fifth of the time.
FFCL_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; PREFETCHES && i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}
FFCL_INLINE void prefetch_tile(const float* p, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) prefetch(p + r * stride, NR * 4);
}

// Rows as words ---------------------------------------------------------------------------------

FFCL_INLINE int64_t words_of(int64_t elements) { return (elements + PER_WORD - 1) / PER_WORD; }
// A row's words, padded to whole steps of a tile.
FFCL_INLINE int64_t padded_words(int64_t elements) { return round_up(words_of(elements), STEP); }

#ifdef FFCL_BF16_PAIRS
FFCL_INLINE Word pair(uint16_t low, uint16_t high) {
  return static_cast<Word>(static_cast<uint32_t>(high) << 16 | low);
}
// out = words of z[i, d : d + n], pairs along the row; the last is filled with 0 where n is odd.
template <class T>
FFCL_INLINE void read_along(const Source<T>& x, int64_t i, int64_t d, int64_t n, Word* out) {
  const auto* from = x.row(i) + d;
  for (int64_t l = 0; l < n / 2; ++l) out[l] = pair(x.get_bf16(i, from + 2 * l), x.get_bf16(i, from + 2 * l + 1));
  if (n % 2) out[n / 2] = pair(x.get_bf16(i, from + n - 1), 0);
}
// out = words (z[i, d + l], z[j, d + l]), l < n; row j counts as 0 from `end` on.
template <class T>
FFCL_INLINE void read_across(const Source<T>& x, int64_t i, int64_t j, int64_t end, int64_t d, int64_t n, Word* out) {
  const auto* low = x.row(i) + d;
  const auto* high = j < end ? x.row(j) + d : nullptr;
  if (high)
    for (int64_t l = 0; l < n; ++l) out[l] = pair(x.get_bf16(i, low + l), x.get_bf16(j, high + l));
  else
    for (int64_t l = 0; l < n; ++l) out[l] = pair(x.get_bf16(i, low + l), 0);
}
#else
template <class T>
FFCL_INLINE void read_along(const Source<T>& x, int64_t i, int64_t d, int64_t n, Word* out) {
  x.read(i, d, n, out);
}
template <class T>
FFCL_INLINE void read_across(const Source<T>& x, int64_t i, int64_t, int64_t, int64_t d, int64_t n, Word* out) {
  x.read(i, d, n, out);
}
#endif

FFCL_INLINE void store_words(Word* p, Words x) {
  typedef Word any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
  *reinterpret_cast<any*>(p) = x;
}

FFCL_INLINE Words load_words(const Word* p) {
  typedef Word any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
  return *reinterpret_cast<const any*>(p);
}

// A VW x VW block's transpose, in place: in each round rows r and r + h exchange the lanes whose number has, or lacks,
// the bit h. One shuffle for each vector and round, where storing rows element by element takes VW.
template <int h, class V, int... lane>
FFCL_INLINE void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(a, b, ((lane & h) ? VW + lane - h : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & h) ? VW + lane : lane + h)...);
#else
  const V low = __builtin_shuffle(a, b, vi{((lane & h) ? VW + lane - h : lane)...});
  b = __builtin_shuffle(a, b, vi{((lane & h) ? VW + lane : lane + h)...});
#endif
  a = low;
}
template <int h = VW / 2, class V>
FFCL_INLINE void transpose(V (&x)[VW]) {
#pragma GCC unroll 16
  for (int r = 0; r < VW; ++r)
    if (!(r & h)) exchange<h>(x[r], x[r + h], std::make_integer_sequence<int, VW>());
  if constexpr (h > 1) transpose<h / 2>(x);
}

// Group of `width` rows, word by word along the dimensions: out[l * width + w] = word l of row first + w. Rows from
// `end` on are zero. By blocks of VW rows, whose words stay in L1 until they are transposed.
template <int width, class T>
void pack_group_by_dim(const Source<T>& x, int64_t first, int64_t end, Word* out) {
  constexpr int64_t block = 64;
  const int64_t valid = larger(0, smaller(width, end - first));
  alignas(64) Word rows[VW][block] = {};
  for (int64_t d0 = 0; d0 < x.dim; d0 += block * PER_WORD, out += block * width) {
    const int64_t n = smaller(block * PER_WORD, x.dim - d0), words = words_of(n), padded = round_up(words, STEP);
    for (int64_t w0 = 0; w0 < width; w0 += VW) {
      const int64_t here = smaller(VW, valid - w0);
      for (int64_t w = 0; w < here; ++w) read_along(x, first + w0 + w, d0, n, rows[w]);
      for (int64_t w = 0; w < VW; ++w)  // what an earlier block or other rows left there
        for (int64_t l = w < here ? words : 0; l < padded; ++l) rows[w][l] = 0;
      for (int64_t l0 = 0; l0 < padded; l0 += VW) {
        Words t[VW];
#pragma GCC unroll 16
        for (int w = 0; w < VW; ++w) t[w] = load_words(rows[w] + l0);
        transpose(t);
        for (int64_t l = 0; l < smaller(VW, padded - l0); ++l) {
          Word* to = out + (l0 + l) * width + w0;
          if (w0 + VW <= width)
            store_words(to, t[l]);
          else
            memcpy(to, &t[l], (width - w0) * sizeof(Word));
        }
      }
    }
  }
}

// All dims of row i, paired with those of the later row j where a word holds two, into panels of `width` dims:
// out[(d / width) * panel + d % width] = x[i, d]; zero from `end` on.
template <int width, class T>
void pack_row_by_panel(const Source<T>& x, int64_t i, int64_t j, int64_t end, int64_t panel, Word* out) {
  for (int64_t d = 0; d < x.dim; d += width, out += panel) {
    const int64_t valid = i < end ? smaller(width, x.dim - d) : 0;
    if (valid == width)  // whose number the compiler knows
      read_across(x, i, j, end, d, width, out);
    else if (valid > 0)
      read_across(x, i, j, end, d, valid, out);
    for (int64_t w = valid; w < width; ++w) out[w] = 0;
  }
}

// A tile of S where the epilogues work on it.
struct Values {
  vf x[MR][2];
};
FFCL_INLINE void scale_values(Values& c, vf factor) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] *= factor, c.x[r][1] *= factor;
}
// The same, and times the units of the rows and columns.
FFCL_INLINE void scale_values(Values& c, vf factor, const float* row_unit, const float* col_unit) {
  const vf c0 = factor * load(col_unit), c1 = factor * load(col_unit + VW);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] *= splat(row_unit[r]) * c0, c.x[r][1] *= splat(row_unit[r]) * c1;
}
FFCL_INLINE void load_values(Values& c, const float* p, int64_t stride = NR) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) c.x[r][0] = load(p + r * stride), c.x[r][1] = load(p + r * stride + VW);
}
FFCL_INLINE void store_values(const Values& c, float* p, int64_t stride = NR) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) store(p + r * stride, c.x[r][0]), store(p + r * stride + VW, c.x[r][1]);
}

#ifdef FFCL_AMX
#include "tile_amx.h"
#else
#include "tile_vector.h"
#endif

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
