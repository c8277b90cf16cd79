// What happens to a tile of S once its product is in registers, whatever instruction made it: exponentials and their
// sums, or the gradient of each pair. acc[m][n] is a thread's part of a 16 x 8 tile (see fragment_row).
#pragma once

#include "cuda_launch.cuh"
#include "similarity_plan.h"

namespace ffcl {

// Weights, shifts and parts of rows or columns: see similarity_cuda.h.
struct Vectors {
  const float* at;
  int n;

  __device__ float weight(int i) const { return i < n ? at[i] : 0.f; }
  __device__ float shift(int i) const { return i < n ? at[static_cast<int64_t>(n) + i] : INFINITY; }
  __device__ float part(int i) const { return i < n ? at[2 * static_cast<int64_t>(n) + i] : 0.f; }
};

// The arguments of a launch of partial sums.
struct SumsArgs {
  const void *q, *k;
  int64_t q_stride, k_stride;
  int dim;
  Mask mask;
  SumsPlan plan;
  int begin, end;  // rows of the chunk
  float headroom;
  bool both;  // column sums are wanted
  const float *scale, *norms;
  float *row_part, *col_part;  // (supers * shares, end - begin), (slots, cols)
};

// The arguments of a panel.
struct PanelArgs {
  const void *q, *k;
  int64_t q_stride, k_stride;
  int dim;
  Mask mask;
  int row_begin, row_end, col_begin, col_end;
  const float *scale, *frame;
  Vectors rows, cols;
  void* panel;
  int64_t stride;

  // Whether rows and columns have normalisers that one exponential cannot serve: far apart, or large.
  __device__ bool needs_two() const { return cols.at && !(frame[1] > 0.f); }
};

namespace {

constexpr float NEVER = -INFINITY;

// What is one for the whole launch: t = factor <q, k>, and |t| <= bound.
struct Exponent {
  float factor, bound, offset;
};

__device__ inline float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Every warp reads the norms for itself.
__device__ inline Exponent exponent_of(const float* scale, const float* norms, float headroom) {
  float q = 0.f, k = 0.f;
  for (int i = threadIdx.x % 32; i < NORM_PARTS; i += 32) {
    q = fmaxf(q, norms[i]);
    k = fmaxf(k, norms[NORM_PARTS + i]);
  }
  Exponent e;
  e.factor = *scale * LOG2E;
  e.bound = fabsf(e.factor) * warp_max(q) * warp_max(k);
  // No offset where none is needed: t - c is rounded, and small t are worth their own precision.
  e.offset = e.bound > headroom ? e.bound - headroom : 0.f;
  return e;
}

// Calls use(m, n, e, acc[m][n][e]) for all of a thread's part. Columns outside, so that nothing of a column has to stay
// in registers.
template <int MF, int NF, class Use>
__device__ __forceinline__ void each(float (&acc)[MF][NF][4], Use use) {
#pragma unroll
  for (int n = 0; n < NF; ++n)
#pragma unroll
    for (int m = 0; m < MF; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) use(m, n, e, acc[m][n][e]);
}

// acc becomes 2^(t - offset), 0 where the pair is left out; (row, col) is the place of the fragment's first tile.
template <int APART, int MF, int NF>
__device__ __forceinline__ void exponentials(float (&acc)[MF][NF][4], const Mask& mask, bool masked, int row, int col,
                                             const Exponent& x) {
  const int lane = threadIdx.x % 32;
  if (!masked) {  // by itself: the compiler would branch at every element
    each(acc, [&](int, int, int, float& t) { t = exp2_fast(fmaf(t, x.factor, -x.offset)); });
    return;
  }
  each(acc, [&](int m, int n, int e, float& value) {
    float t = fmaf(value, x.factor, -x.offset);
    const int i = row + fragment_row(lane, m, e, APART), j = col + fragment_col(lane, n, e);
    if (!kept(mask, i, j)) t = NEVER;
    // A diagonal pair is added to its row and to its column, which are the same sum: half each.
    if (mask.triangle && i == j) t -= 1.f;
    value = exp2_fast(t);
  });
}

// Adds a tile's exponentials to the sums of its rows (`to`: shared memory, of this warp alone) and columns.
template <int APART, int MF, int NF>
__device__ __forceinline__ void add_sums(const float (&acc)[MF][NF][4], float* to, float (&col_sums)[NF][2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < NF; ++n) {
        sum += acc[m][n][2 * half] + acc[m][n][2 * half + 1];
        col_sums[n][0] += acc[m][n][2 * half];
        col_sums[n][1] += acc[m][n][2 * half + 1];
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0) to[fragment_row(lane, m, 2 * half, APART)] += sum;
    }
}

// The sums of a warp's columns, over its rows, into shared memory; the registers start again from zero.
template <int NF>
__device__ __forceinline__ void put_col_sums(float (&col_sums)[NF][2], float* to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < NF; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = col_sums[n][e];
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < 4) to[fragment_col(lane, n, e)] = sum;
      col_sums[n][e] = 0.f;
    }
}

// What a thread's rows and columns of a tile bring to its pairs where one exponential serves a pair: 2^(t - shift)
// times a weight of the row, or the sum of one of the row and one of the column.
template <int MF>
struct RowTerms {
  float shift[MF][2], weight[MF][2];

  // `shared`: rows and columns have a term each, whose shifts are close enough to the frame's.
  __device__ __forceinline__ void load(const Vectors& rows, int row, int apart, bool shared, const float* frame) {
#pragma unroll
    for (int m = 0; m < MF; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + fragment_row(threadIdx.x % 32, m, 2 * half, apart);
        shift[m][half] = shared ? frame[0] : rows.shift(i);
        weight[m][half] = shared ? rows.part(i) : rows.weight(i);
      }
  }
};
template <int NF>
struct ColTerms {
  float weight[NF][2];

  __device__ __forceinline__ void load(const Vectors& cols, int col, bool shared) {
#pragma unroll
    for (int n = 0; n < NF; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) weight[n][e] = shared ? cols.part(col + fragment_col(threadIdx.x % 32, n, e)) : 0.f;
  }
};

// 2^(t - shift) of a normaliser's own shift, at most 1. t is rounded, as sum_online rounds it: of a large one nothing
// else would do, and the compiler may not make one instruction of product and difference. (Where an offset served, t is
// small. On sm_90 sum_online multiplies by mma and the panels by wgmma: whether those round alike is not known.)
__device__ __forceinline__ float probability(float x, float factor, float shift) {
  const float d = __fmul_rn(x, factor) - shift;
  return exp2_fast(d > 0.f ? 0.f : d);  // NaN stays
}

template <int MF, int NF>
__device__ __forceinline__ void row_exponential(float (&acc)[MF][NF][4], const RowTerms<MF>& rows, float factor) {
  each(acc,
       [&](int m, int, int e, float& x) { x = probability(x, factor, rows.shift[m][e / 2]) * rows.weight[m][e / 2]; });
}

// Of normalisers near each other and of moderate size: rounding of t is too small to matter there.
template <int MF, int NF>
__device__ __forceinline__ void joint_exponential(float (&acc)[MF][NF][4], const RowTerms<MF>& rows,
                                                  const ColTerms<NF>& cols, float factor) {
  each(acc, [&](int m, int n, int e, float& x) {
    x = exp2_fast(fmaf(x, factor, -rows.shift[m][e / 2])) * (rows.weight[m][e / 2] + cols.weight[n][e % 2]);
  });
}

// acc becomes the gradients of pairs whose row's and column's normalisers are too far apart, or too large, for one.
template <int APART, int MF, int NF>
__device__ __forceinline__ void two_exponentials(float (&acc)[MF][NF][4], int row, int col, float factor,
                                                 const Vectors& rows, const Vectors& cols) {
  const int lane = threadIdx.x % 32;
  RowTerms<MF> of_rows;
  of_rows.load(rows, row, APART, false, nullptr);
#pragma unroll
  for (int n = 0; n < NF; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int j = col + fragment_col(lane, n, e);
      const float weight = cols.weight(j), shift = cols.shift(j);
#pragma unroll
      for (int m = 0; m < MF; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = acc[m][n][2 * half + e];
          const float of_row = probability(x, factor, of_rows.shift[m][half]) * of_rows.weight[m][half];
          x = fmaf(probability(x, factor, shift), weight, of_row);
        }
    }
}

// `value` for the pairs that are left out: by itself, since inside the loops the compiler would branch at each element.
template <int APART, int MF, int NF>
__device__ __forceinline__ void leave_out(float (&acc)[MF][NF][4], const Mask& mask, int row, int col,
                                          float value = 0.f) {
  const int lane = threadIdx.x % 32;
  each(acc, [&](int m, int n, int e, float& x) {
    if (!kept(mask, row + fragment_row(lane, m, e, APART), col + fragment_col(lane, n, e))) x = value;
  });
}

// acc becomes the gradients of the pairs of the tile at (row, col), of which this warp's fragment begins at (warp_row,
// warp_col); `rows` and `cols` need to be loaded only where one exponential serves a pair (not `apart`).
template <int APART, int MF, int NF>
__device__ __forceinline__ void pair_gradients(float (&acc)[MF][NF][4], const PanelArgs& a, bool apart,
                                               const RowTerms<MF>& rows, const ColTerms<NF>& cols, float factor,
                                               int row, int col, int warp_row, int warp_col) {
  if (apart)
    two_exponentials<APART>(acc, row + warp_row, col + warp_col, factor, a.rows, a.cols);
  else if (a.cols.at)
    joint_exponential(acc, rows, cols, factor);
  else
    row_exponential(acc, rows, factor);
  if (needs_mask(a.mask, row, col, TILE, TILE)) leave_out<APART>(acc, a.mask, row + warp_row, col + warp_col);
}

template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float x, float y) {
  T pair[2];
  assign(pair[0], x);
  assign(pair[1], y);
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// A warp's fragment, rounded, to the panel, whose rows are 16-byte aligned and may be written to the next multiple of 8
// elements. The four threads of a row exchange four fragments' columns, so that each stores 16 bytes of one: a
// 4 x 4 transposition, blocks of two, then what is in them.
template <class T, int APART, int MF, int NF>
__device__ __forceinline__ void store_fragment(const float (&acc)[MF][NF][4], void* panel, int64_t stride, int row,
                                               int col, int height, int width) {
  static_assert(NF % 4 == 0);
  const int lane = threadIdx.x % 32, place = lane % 4;
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < NF; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = rounded_pair<T>(acc[m][n + i][2 * half], acc[m][n + i][2 * half + 1]);
#pragma unroll
        for (int step = 2; step; step /= 2)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const bool upper = place & step;
            const uint32_t theirs = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + step], step);
            if (upper)
              words[i] = theirs;
            else
              words[i + step] = theirs;
          }
        const int r = row + fragment_row(lane, m, 2 * half, APART), c = col + 8 * (n + place);
        if (r < height && c < width)
          store16(static_cast<uint16_t*>(panel) + r * stride + c, uint4{words[0], words[1], words[2], words[3]});
      }
}

// A warp's fragment, rounded, into a tile of T in shared memory whose rows are PANEL_PITCH bytes apart.
template <class T, int APART, int MF, int NF>
__device__ __forceinline__ void stage_tile(const float (&acc)[MF][NF][4], unsigned char* tile, int row, int col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int n = 0; n < NF; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at =
            (row + fragment_row(lane, m, 2 * half, APART)) * PANEL_PITCH + (col + fragment_col(lane, n, 0)) * 2;
        *reinterpret_cast<uint32_t*>(tile + at) = rounded_pair<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
}

// From there to the panel, 16 bytes a thread and store; `threads` threads, of which this is number `thread`.
__device__ inline void store_tile(const unsigned char* tile, void* panel, int64_t stride, int row, int col, int height,
                                  int width, int thread, int threads) {
  for (int i = thread; i < TILE * (TILE / 8); i += threads) {
    const int r = i / (TILE / 8), c = i % (TILE / 8) * 8;
    if (row + r < height && col + c < width)
      store16(static_cast<uint16_t*>(panel) + (row + r) * stride + col + c, load16(tile + r * PANEL_PITCH + c * 2));
  }
}

}  // namespace

// similarity_sm90.cu; not_built where the build has no sm_90a.
int sums_sm90(const SumsArgs&, int dtype, int64_t clusters, void* stream);
int panel_sm90(const PanelArgs&, int dtype, int processors, void* stream);

}  // namespace ffcl
