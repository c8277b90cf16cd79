// Contrastive similarity for compute capability 8.0 and later: normalisers and pair gradients by mma and cp.async, what
// surrounds them on every chip (norms, the last sums, the rescue), and the entry points.
#include "similarity_cuda.h"
#include "similarity_tile.cuh"

namespace ffcl {
namespace {

constexpr int THREADS80 = WARPS80 * 32, MF = 2, NF = 8;  // a warp has 32 x 64 of the tile

struct Operand {
  const void* x;
  int64_t stride;
  int rows, dim;
};

// One step of both operands into a stage of shared memory, in the background. Rows past the end are copies of the last.
__device__ inline void load_step(const Operand& x, int row, int step, unsigned char* to) {
#pragma unroll
  for (int h = 0; h < TILE * 4 / THREADS80; ++h) {
    const int i = threadIdx.x + h * THREADS80, r = i / 4, part = i % 4, depth = step * STEP80 + part * 8;
    const int from = least(row + r, x.rows - 1);
    const bool valid = depth < x.dim;
    const auto* source = static_cast<const uint16_t*>(x.x) + from * x.stride + (valid ? depth : 0);
    copy16_async(to + part_offset80(r, part), source, valid);
  }
}

// acc = q[row..] k[col..]^T for this warp's part of a tile. Ends with all threads done with the stages.
template <class T>
__device__ __forceinline__ void product80(float (&acc)[MF][NF][4], const Operand& q, const Operand& k, int row, int col,
                                          int warp_row, int warp_col) {
  unsigned char* stages = shared_memory();
  const int steps = ceil_div(q.dim, STEP80), lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int n = 0; n < NF; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
  auto fetch = [&](int step) {
    unsigned char* to = stages + step % STAGES80 * (2 * OPERAND80);
    if (step < steps) {
      load_step(q, row, step, to);
      load_step(k, col, step, to + OPERAND80);
    }
    copies_commit();
  };
  for (int step = 0; step < STAGES80 - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    copies_wait<STAGES80 - 2>();
    __syncthreads();  // the stage has arrived for all, and all are done with the one that is filled next
    fetch(step + STAGES80 - 1);
    const unsigned char* left = stages + step % STAGES80 * (2 * OPERAND80);
    const unsigned char* right = left + OPERAND80;
#pragma unroll
    for (int half = 0; half < STEP80 / 16; ++half) {
      uint32_t a[MF][4];
#pragma unroll
      for (int m = 0; m < MF; ++m)
        load_matrices(a[m], left + part_offset80(warp_row + 16 * m + left_row(lane), 2 * half + left_part(lane)));
#pragma unroll
      for (int n = 0; n < NF; n += 2) {
        uint32_t b[4];
        load_matrices(b, right + part_offset80(warp_col + 8 * n + right_row(lane), 2 * half + right_part(lane)));
#pragma unroll
        for (int m = 0; m < MF; ++m) {
          multiply(acc[m][n], a[m], b[0], b[1], T());
          multiply(acc[m][n + 1], a[m], b[2], b[3], T());
        }
      }
    }
  }
  copies_wait<0>();
  __syncthreads();
}

// How it works: a block walks down the columns of tiles of its super-tile. One exp2 an element feeds both sums: column
// sums stay in registers down a column of tiles, row sums in shared memory, one array for each of the two columns of
// warps. Bound by: tensor cores for wide embeddings; below a width of 256, exp2 takes as long.
template <class T>
__global__ void __launch_bounds__(THREADS80) sums80(__grid_constant__ const SumsArgs a) {
  const Cell cell = super_of(a.plan, blockIdx.x, a.begin, a.end);
  if (cell.col < 0 || cell.col >= a.plan.supers) return;
  const Exponent x = exponent_of(a.scale, a.norms, a.headroom);
  if (x.bound > BOUND_LIMIT) return;
  const Operand q{a.q, a.q_stride, a.mask.rows, a.dim}, k{a.k, a.k_stride, a.mask.cols, a.dim};
  const int warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * 64;
  const int row = cell.row * a.plan.side, col = cell.col * a.plan.side, first = a.begin / a.plan.side;
  float* row_sums = reinterpret_cast<float*>(shared_memory() + PRODUCT_SHARED80);  // (2, MAX_SPAN * TILE)
  float* col_shares = row_sums + 2 * MAX_SPAN * TILE;  // (4, TILE)
  for (int i = threadIdx.x; i < 2 * MAX_SPAN * TILE; i += THREADS80) row_sums[i] = 0.f;
  __syncthreads();
  float col_sums[NF][2] = {};
  const int rows_here = least(a.plan.span, ceil_div(a.end - row, TILE));
  for (int j = 0; j < a.plan.span && col + j * TILE < a.mask.cols; ++j) {
    const int at = col + j * TILE;
    const int tiles = a.mask.triangle ? least(rows_here, ceil_div(at + TILE - row, TILE)) : rows_here;
    for (int i = 0; i < tiles; ++i) {
      const int r = row + i * TILE;
      float acc[MF][NF][4];
      product80<T>(acc, q, k, r, at, warp_row, warp_col);
      const bool masked = needs_mask(a.mask, r, at, TILE, TILE);
      exponentials<APART80>(acc, a.mask, masked, r + warp_row, at + warp_col, x);
      add_sums<APART80>(acc, row_sums + warp / 4 * MAX_SPAN * TILE + i * TILE + warp_row, col_sums);
    }
    if (a.both) {
      put_col_sums(col_sums, col_shares + warp % 4 * TILE + warp_col);
      __syncthreads();
      if (threadIdx.x < TILE && at + static_cast<int>(threadIdx.x) < a.mask.cols) {
        float sum = 0.f;
        for (int w = 0; w < 4; ++w) sum += col_shares[w * TILE + threadIdx.x];
        a.col_part[static_cast<int64_t>(cell.row - first) * a.mask.cols + at + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.plan.side && row + i < a.end; i += THREADS80)
    a.row_part[static_cast<int64_t>(cell.col) * (a.end - a.begin) + (row + i - a.begin)] =
        row_sums[i] + row_sums[MAX_SPAN * TILE + i];
}

// How it works: a tile of G a block, through shared memory to the panel. Bound by: tensor cores for wide embeddings.
template <class T>
__global__ void __launch_bounds__(THREADS80) panel80(__grid_constant__ const PanelArgs a) {
  const int height = a.row_end - a.row_begin, width = a.col_end - a.col_begin;
  const Cell cell = grouped(blockIdx.x, ceil_div(height, TILE), ceil_div(width, TILE));
  const int row = cell.row * TILE, col = cell.col * TILE;
  const int warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * 64;
  const Operand q{a.q, a.q_stride, a.mask.rows, a.dim}, k{a.k, a.k_stride, a.mask.cols, a.dim};
  const int r = a.row_begin + row, c = a.col_begin + col;
  float acc[MF][NF][4];
  product80<T>(acc, q, k, r, c, warp_row, warp_col);
  const bool apart = a.needs_two();
  RowTerms<MF> rows;
  ColTerms<NF> cols;
  if (!apart) {
    rows.load(a.rows, r + warp_row, APART80, a.cols.at, a.frame);
    cols.load(a.cols, c + warp_col, a.cols.at);
  }
  pair_gradients<APART80>(acc, a, apart, rows, cols, *a.scale * LOG2E, r, c, warp_row, warp_col);
  stage_tile<T, APART80>(acc, shared_memory(), warp_row, warp_col);
  __syncthreads();
  store_tile(shared_memory(), a.panel, a.stride, row, col, height, width, threadIdx.x, THREADS80);
}

// ---------------------------------------------------------------------------------------------------------------------
// On every chip
// ---------------------------------------------------------------------------------------------------------------------
constexpr int NORM_THREADS = 256;

// <x, x> of a row by a warp, in all its lanes.
template <class T>
__device__ float warp_squares(const T* x, int dim) {
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < dim / 8; i += 32) {
    const auto a = Pack<T, 8>::load(x + i * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(to_float(a.x[j]), to_float(a.x[j]), sum);
  }
  return warp_sum(sum);
}

// How it works: a warp squares and adds a row; each block leaves the largest norm of every NORM_PARTS-th group of rows.
// Bound by memory: one read of q and k.
template <class T>
__global__ void __launch_bounds__(NORM_THREADS)
    largest_norms(const T* q, const T* k, int rows, int cols, int64_t q_stride, int64_t k_stride, int dim,
                  float* norms) {
  const bool of_k = blockIdx.x >= NORM_PARTS;
  const T* x = of_k ? k : q;
  const int64_t stride = of_k ? k_stride : q_stride;
  const int n = of_k ? cols : rows, warp = threadIdx.x / 32, warps = NORM_THREADS / 32;
  float best = 0.f;
  for (int64_t row = static_cast<int64_t>(blockIdx.x % NORM_PARTS) * warps + warp; row < n; row += NORM_PARTS * warps) {
    const float squares = warp_squares(x + row * stride, dim);
    // NaN and overflow would spoil rows that have neither; those that have are caught by their own sums.
    if (squares < INFINITY) best = fmaxf(best, squares);
  }
  float* largest = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) largest[warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < warps; ++i) best = fmaxf(best, largest[i]);
    norms[blockIdx.x] = sqrtf(best);
  }
}

// The sum of 2^(t - shift), where the shift is the largest t so far: nothing overflows, and what vanishes is below
// 2^-126 of the largest.
struct Online {
  float top = NEVER, sum = 0.f;

  __device__ float shift() const { return fabsf(top) < INFINITY ? top : 0.f; }
  __device__ void raise(float to) {
    const float before = top;
    top = fmaxf(top, to);
    sum *= exp2_fast(before - shift());
  }
  __device__ void add(Online other) {
    raise(other.top);
    other.raise(top);
    sum += other.sum;
  }
};

static_assert(sizeof(Online) == 8, "FINISH_SHARED80 counts on it");

// What a normaliser is made of: those of x over y.
struct Side {
  Operand x, y;
  Mask mask;
};

// sum_j 2^t_ij of the TILE normalisers from `first`, without an offset that could be wrong for them, into sums
// (ONLINE_SHARES, TILE) in shared memory: a share of each thread that has pairs of the normaliser.
template <class T>
__device__ __forceinline__ void sum_online(Online* sums, const Side& side, int first, float factor) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * 64;
  auto mine = [&](int m, int half) -> Online& {
    return sums[(warp / 4 * 4 + lane % 4) * TILE + warp_row + fragment_row(lane, m, 2 * half, APART80)];
  };
#pragma unroll
  for (int m = 0; m < MF; ++m) mine(m, 0) = mine(m, 1) = Online();
  for (int at = 0; at < side.mask.cols; at += TILE) {
    float t[MF][NF][4];
    product80<T>(t, side.x, side.y, first, at, warp_row, warp_col);
    each(t, [&](int, int, int, float& x) { x = __fmul_rn(x, factor); });
    if (needs_mask(side.mask, first, at, TILE, TILE))
      leave_out<APART80>(t, side.mask, first + warp_row, at + warp_col, NEVER);
#pragma unroll
    for (int m = 0; m < MF; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Online o = mine(m, half);
        float top = NEVER, sum = 0.f;  // the tile by itself: a long row's sum would lose what is added to it one by one
#pragma unroll
        for (int n = 0; n < NF; ++n) top = fmaxf(top, fmaxf(t[m][n][2 * half], t[m][n][2 * half + 1]));
        o.raise(top);
#pragma unroll
        for (int n = 0; n < NF; ++n)
          sum += exp2_fast(t[m][n][2 * half] - o.shift()) + exp2_fast(t[m][n][2 * half + 1] - o.shift());
        o.sum += sum;
        mine(m, half) = o;
      }
  }
}

struct FinishArgs {
  SumsArgs sums;
  float lost;
  float *row_lse, *col_lse;
  float* rests;  // of the rows' normalisers, then of the columns'; may be null
  int row_blocks;  // blocks of normalisers of rows; those of columns come after
};

// How it works: two threads add a normaliser's partial sums, each every other slot, and turn them into a logarithm.
// Where the constant offset lost one (its sum is too small or infinite, or the bound is past BOUND_LIMIT) the block
// computes its TILE normalisers again, with maxima that rise: a branch on device data that nearly every launch skips
// (a row without a pair takes it). Bound by memory, 64 MiB of partial sums at most; by the tensor cores where it
// computes again.
template <class T>
__global__ void __launch_bounds__(THREADS80, 2) finish(__grid_constant__ const FinishArgs f) {
  const SumsArgs& a = f.sums;
  const Exponent x = exponent_of(a.scale, a.norms, a.headroom);
  const bool served = x.bound <= BOUND_LIMIT, is_col = static_cast<int>(blockIdx.x) >= f.row_blocks;
  float* lse = is_col ? f.col_lse : f.row_lse;
  const int start = is_col ? (blockIdx.x - f.row_blocks) * TILE : a.begin + blockIdx.x * TILE;
  const int stop = is_col ? a.mask.cols : a.mask.triangle ? a.mask.rows : a.end;
  const int index = start + threadIdx.x % TILE, half = threadIdx.x / TILE;
  // Normalisers of columns, and of the triangle's later rows, grow chunk by chunk: until then lse has their sum.
  const bool complete = is_col ? a.end == a.mask.rows : !a.mask.triangle || start < a.end;
  float total = 0.f;
  if (index < stop && served) {
    const Slots s = slots_of(a.plan, is_col, start, a.begin, a.end);
    if ((is_col || a.mask.triangle) && a.begin > 0 && !half) total = lse[index];
    for (int slot = s.first_row + half; slot < s.last_row; slot += 2)
      total += a.row_part[static_cast<int64_t>(slot) * (a.end - a.begin) + (index - a.begin)];
    for (int slot = half; slot < s.last_col; slot += 2)
      total += a.col_part[static_cast<int64_t>(slot) * a.mask.cols + index];
  }
  float* halves = reinterpret_cast<float*>(shared_memory() + PRODUCT_SHARED80);  // (2, TILE)
  Online* online = reinterpret_cast<Online*>(halves + 2 * TILE);  // (ONLINE_SHARES, TILE)
  halves[threadIdx.x] = total;
  __syncthreads();
  total = halves[index - start] + halves[TILE + index - start];
  const bool mine = index < stop && !half;
  if (!complete) {
    if (mine) lse[index] = total;
    return;
  }

  auto lost = [&] { return index < stop && (!served || total < f.lost || total == INFINITY); };
  if (__syncthreads_or(lost())) {
    const Operand q{a.q, a.q_stride, a.mask.rows, a.dim}, k{a.k, a.k_stride, a.mask.cols, a.dim};
    Mask mask = a.mask;
    mask.triangle = false;
    if (is_col)  // two calls: operands chosen before one would have to move from constant memory to registers
      sum_online<T>(online, {k, q, mirrored(mask)}, start, x.factor);
    else
      sum_online<T>(online, {q, k, mask}, start, x.factor);
    __syncthreads();
  }
  if (!mine) return;
  total = halves[threadIdx.x] + halves[TILE + threadIdx.x];  // anew: it holds no register while tiles are multiplied
  float shift = x.offset;
  if (lost()) {
    Online o;
    for (int share = 0; share < ONLINE_SHARES; ++share) o.add(online[share * TILE + threadIdx.x]);
    total = o.sum;
    shift = o.shift();
  }
  // Natural logarithms by the factor that was used, which is not quite log2 e: see exponent() of the Triton kernels.
  const float scale = *a.scale;
  const double unit = scale == 0.f ? 1.4426950408889634 : static_cast<double>(x.factor) / static_cast<double>(scale);
  const double exact = (log2(static_cast<double>(total)) + shift) / unit;
  const float rounded = static_cast<float>(exact);
  lse[index] = rounded;
  float* rests = is_col && f.rests ? f.rests + a.mask.rows : f.rests;
  if (rests) rests[index] = fabsf(rounded) < INFINITY ? static_cast<float>(exact - rounded) : 0.f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------
// Whether TMA can be told of rows this far apart: they may not overlap, and the stride has 40 bits, in bytes.
bool described(int64_t stride, int64_t dim) { return stride >= dim && stride < int64_t{1} << 39; }

bool sensible(const SimilarityCuda& s) {
  constexpr int64_t LONGEST = INT_MAX - 4096;
  return s.rows > 0 && s.cols > 0 && s.rows <= LONGEST && s.cols <= LONGEST && s.dim > 0 && s.dim <= 4096 &&
         s.dim % 8 == 0 && s.q_stride % 8 == 0 && s.k_stride % 8 == 0 && aligned(s.q) && aligned(s.k) &&
         s.dtype != DType::float32 && s.exclude >= 0 && s.exclude <= 4 && (s.exclude < 2 || (s.row_ids && s.col_ids)) &&
         (!s.triangle || (s.q == s.k && s.rows == s.cols)) &&
         (s.way != SimilarityWay::sm90 || (described(s.q_stride, s.dim) && described(s.k_stride, s.dim)));
}

Mask mask_of(const SimilarityCuda& s, bool triangle) {
  return {static_cast<int>(s.rows), static_cast<int>(s.cols), s.exclude, triangle, s.row_ids, s.col_ids};
}

SumsPlan plan_of(const SimilarityCuda& s, int processors) {
  return plan_sums(static_cast<int>(s.rows), static_cast<int>(s.cols), s.triangle, s.way == SimilarityWay::sm90,
                   processors);
}

template <class T>
int forward(const SimilarityCuda& s, const SumsPlan& plan, float* row_lse, float* col_lse, float* rests,
            float* workspace) {
  SumsArgs a{s.q, s.k, s.q_stride, s.k_stride, static_cast<int>(s.dim), mask_of(s, s.triangle), plan};
  const Headroom room = headroom(a.mask.rows, a.mask.cols);
  a.headroom = room.headroom;
  a.both = col_lse || s.triangle;
  a.scale = s.scale;
  a.norms = workspace;
  a.row_part = workspace + 2 * NORM_PARTS;
  a.col_part = a.row_part + plan.row_floats();
  int status =
      launch(largest_norms<T>, Grid{2 * NORM_PARTS, NORM_THREADS, PART_BYTES, 1}, s.stream, static_cast<const T*>(s.q),
             static_cast<const T*>(s.k), a.mask.rows, a.mask.cols, s.q_stride, s.k_stride, a.dim, workspace);
  for (int64_t begin = 0; status == ok && begin < s.rows; begin += plan.chunk) {
    a.begin = static_cast<int>(begin);
    a.end = static_cast<int>(least<int64_t>(s.rows, begin + plan.chunk));
    const int64_t clusters = sums_clusters(plan, a.begin, a.end);
    status = s.way == SimilarityWay::sm90 ? sums_sm90(a, static_cast<int>(s.dtype), clusters, s.stream)
                                          : launch(sums80<T>, Grid{clusters, THREADS80, SUMS_SHARED80, 1}, s.stream, a);
    if (status != ok) return status;
    FinishArgs f{a, room.lost, row_lse, col_lse, rests, 0};
    f.row_blocks = ceil_div((s.triangle ? a.mask.rows : a.end) - a.begin, TILE);
    const int col_blocks = col_lse && !s.triangle ? ceil_div(a.mask.cols, TILE) : 0;
    status = launch(finish<T>, Grid{f.row_blocks + col_blocks, THREADS80, FINISH_SHARED80, 1}, s.stream, f);
  }
  return status;
}

template <class Use>
int with_half(DType dtype, Use use) {
  return dtype == DType::bfloat16 ? use(__nv_bfloat16()) : dtype == DType::float16 ? use(__half()) : int(bad_argument);
}

}  // namespace

int64_t similarity_workspace_cuda(const SimilarityCuda& s) {
  OnDevice guard(s.device);
  const Chip chip = guard.chip();
  if (!sensible(s) || guard.error != cudaSuccess) return -1;
  return sums_workspace(plan_of(s, chip.processors), static_cast<int>(s.cols));
}

int similarity_forward_cuda(const SimilarityCuda& s, float* row_lse, float* col_lse, float* rests, float* workspace,
                            int64_t size) {
  if (!sensible(s)) return bad_argument;
  OnDevice guard(s.device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  const SumsPlan plan = plan_of(s, chip.processors);
  if (size < sums_workspace(plan, static_cast<int>(s.cols))) return bad_argument;
  return with_half(s.dtype,
                   [&](auto type) { return forward<decltype(type)>(s, plan, row_lse, col_lse, rests, workspace); });
}

int similarity_panel_cuda(const SimilarityCuda& s, const float* row_vectors, const float* col_vectors,
                          const float* frame, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                          void* panel, int64_t panel_stride) {
  if (!sensible(s) || row_begin < 0 || row_begin >= row_end || row_end > s.rows || col_begin < 0 ||
      col_begin >= col_end || col_end > s.cols || !aligned(panel) || panel_stride % 8 ||
      panel_stride < ceil_div<int64_t>(col_end - col_begin, 8) * 8)
    return bad_argument;
  OnDevice guard(s.device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  // Every pair of a panel has its gradient, those below the diagonal too.
  PanelArgs a{s.q, s.k, s.q_stride, s.k_stride, static_cast<int>(s.dim), mask_of(s, false)};
  a.row_begin = static_cast<int>(row_begin);
  a.row_end = static_cast<int>(row_end);
  a.col_begin = static_cast<int>(col_begin);
  a.col_end = static_cast<int>(col_end);
  a.scale = s.scale;
  a.frame = frame;
  a.rows = {row_vectors, a.mask.rows};
  a.cols = {col_vectors, a.mask.cols};
  a.panel = panel;
  a.stride = panel_stride;
  if (s.way == SimilarityWay::sm90) return panel_sm90(a, static_cast<int>(s.dtype), chip.processors, s.stream);
  const int64_t tiles = ceil_div<int64_t>(row_end - row_begin, TILE) * ceil_div<int64_t>(col_end - col_begin, TILE);
  return with_half(s.dtype, [&](auto type) {
    return launch(panel80<decltype(type)>, Grid{tiles, THREADS80, PRODUCT_SHARED80, 1}, s.stream, a);
  });
}

}  // namespace ffcl
