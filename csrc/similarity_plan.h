// How the CUDA similarity kernels cut S = scale q k^T: tiles, super-tiles, masks, shared-memory layouts. Plain
// arithmetic that host and device share, tested on the CPU.
//
// A block (on sm_90: a cluster of two) owns a super-tile: `span` x `span` tiles of 128 x 128. It leaves one partial sum
// a row and one a column (on sm_90: two), so rows x cols / (128 span) floats of each kind leave the chip. A long
// problem runs once per chunk of rows, so that the partial sums fit into a bounded workspace. No atomics: everything is
// added in one order.
#pragma once

#include <cstdint>

#include "cuda_plan.h"

namespace ffcl {

constexpr int TILE = 128;  // rows and columns of a tile of S
constexpr int MAX_SPAN = 8;
constexpr int GROUP = 8;  // super-tile rows that walk the columns together: their operands share L2
constexpr int NORM_PARTS = 128;
constexpr int CLUSTER90 = 2, CONSUMERS90 = 2;  // blocks of a cluster, and warpgroups of each that multiply
static_assert(CLUSTER90 == CONSUMERS90, "SumsPlan::shares counts both");
inline int64_t sums_workspace_limit = 64 << 20;  // bytes of partial sums of one launch; tests lower it
constexpr float LOG2E = 1.4426950408889634f;
// One offset serves exponents about 195 powers of two below their bound; what is lower is lost to it and rescued. Past
// this bound nearly everything would be: then the rescue does all the work.
constexpr float BOUND_LIMIT = 512.f;

// What is left out of S: see ffcl_fast/ops.py.
struct Mask {
  int rows = 0, cols = 0;
  int exclude = 0;  // ffcl::Exclude
  bool triangle = false;  // k = q: only pairs on or above the diagonal count, the mirror speaks for the others
  const int64_t *row_ids = nullptr, *col_ids = nullptr;
};

FFCL_HD inline bool kept(const Mask& m, int i, int j) {
  if (i >= m.rows || j >= m.cols || (m.triangle && i > j)) return false;
  switch (m.exclude) {
    case 0: return true;
    case 1: return i != j;
    case 2: return m.row_ids[i] != m.col_ids[j];
    case 3: return m.row_ids[i] != m.col_ids[j] || i == j;
    default: return m.row_ids[i] == m.col_ids[j];
  }
}

// The same for S transposed.
FFCL_HD inline Mask mirrored(const Mask& m) { return {m.cols, m.rows, m.exclude, m.triangle, m.col_ids, m.row_ids}; }

// Whether the tile of height x width at (row, col) has a pair that needs kept(), or one on the triangle's diagonal.
FFCL_HD inline bool needs_mask(const Mask& m, int row, int col, int height, int width) {
  if (row + height > m.rows || col + width > m.cols || m.exclude > 1) return true;
  if (m.triangle) return row + height > col;
  return m.exclude == 1 && row < col + width && col < row + height;
}

struct Cell {
  int row, col;  // col < 0: nothing to do
};

// Cell of a height x width grid in an order where GROUP rows walk the columns together.
FFCL_HD inline Cell grouped(int64_t at, int height, int width) {
  const int64_t area = static_cast<int64_t>(GROUP) * width;
  const int first = static_cast<int>(at / area) * GROUP, size = least(height - first, GROUP);
  const int within = static_cast<int>(at % area);
  return {first + within % size, within / size};
}

// Cell (row, col >= row) of the rows first..last-1 of a total x total triangle. Rows first + a and last - 1 - a
// together always hold the same number of cells, so a pair of rows is one line of a rectangle.
FFCL_HD inline Cell folded(int64_t at, int first, int last, int total) {
  const Cell c = grouped(at, (last - first + 1) / 2, 2 * total - first - last + 1);
  const int upper = first + c.row, lower = last - 1 - c.row, length = total - upper;
  if (c.col < length) return {upper, upper + c.col};
  if (upper == lower) return {upper, -1};
  return {lower, lower + c.col - length};
}

struct SumsPlan {
  int span = 1;  // tiles on a side of a super-tile
  int shares = 1;  // partial sums that a super-tile leaves of a row (one a block) and of a column (one a group)
  int side = TILE;
  int supers = 1;  // super-tiles along the columns
  int chunk = TILE;  // rows a launch
  bool triangle = false;

  // Floats of workspace: largest norms, then the partial sums of rows and of columns.
  FFCL_HD int64_t row_floats() const { return static_cast<int64_t>(supers) * shares * chunk; }
  FFCL_HD int64_t col_slots() const { return static_cast<int64_t>(chunk / side) * shares; }
};

inline int64_t super_tiles(int rows, int cols, int span) {
  return static_cast<int64_t>(ceil_div(rows, span * TILE)) * ceil_div(cols, span * TILE);
}

// The span that takes least time: as many rounds of `clusters` super-tiles as there are, of which each takes as long as
// its tiles and, until the first product has its operands, about one more.
inline int span90(int rows, int cols, bool triangle, int clusters) {
  int best = MAX_SPAN;
  int64_t least_time = INT64_MAX;
  for (int span = MAX_SPAN; span >= CLUSTER90; span /= 2) {
    int64_t cells = super_tiles(rows, cols, span);
    if (triangle) cells = (cells + ceil_div(rows, span * TILE)) / 2;
    const int64_t time = ceil_div<int64_t>(cells, most(1, clusters)) * (span * span / CLUSTER90 + 1);
    if (time < least_time) best = span, least_time = time;
  }
  return best;
}

// A multiprocessor has several blocks, which fill each other's gaps: four super-tiles for each if possible.
inline int span80(int rows, int cols, bool triangle, int processors) {
  const int64_t wanted = static_cast<int64_t>(triangle ? 8 : 4) * processors;
  int span = MAX_SPAN;
  while (span > 1 && super_tiles(rows, cols, span) < wanted) span /= 2;
  return span;
}

inline SumsPlan plan_sums(int rows, int cols, bool triangle, bool cluster, int processors) {
  SumsPlan p;
  p.triangle = triangle;
  p.shares = cluster ? CLUSTER90 : 1;
  p.span = cluster ? span90(rows, cols, triangle, processors / CLUSTER90) : span80(rows, cols, triangle, processors);
  p.side = p.span * TILE;
  p.supers = ceil_div(cols, p.side);
  const int64_t fit = most<int64_t>(1, sums_workspace_limit / (8 * p.shares * static_cast<int64_t>(most(cols, 1))));
  p.chunk = static_cast<int>(least<int64_t>(ceil_div(rows, p.side), fit)) * p.side;
  return p;
}

inline int64_t sums_workspace(const SumsPlan& p, int cols) {
  return 2 * NORM_PARTS + p.row_floats() + p.col_slots() * cols;
}

// Clusters of the launch for rows begin..end-1.
inline int64_t sums_clusters(const SumsPlan& p, int begin, int end) {
  const int first = begin / p.side, last = ceil_div(end, p.side);
  if (!p.triangle) return static_cast<int64_t>(last - first) * p.supers;
  return static_cast<int64_t>((last - first + 1) / 2) * (2 * p.supers - first - last + 1);
}

// Super-tile of a cluster.
FFCL_HD inline Cell super_of(const SumsPlan& p, int64_t cluster, int begin, int end) {
  const int first = begin / p.side, last = ceil_div(end, p.side);
  if (p.triangle) return folded(cluster, first, last, p.supers);
  const Cell c = grouped(cluster, last - first, p.supers);
  return {first + c.row, c.col};
}

// The slots of partial sums that make up normaliser `index` after the chunk begin..end-1.
struct Slots {
  int first_row = 0, last_row = 0;  // of row_part
  int last_col = 0;  // of col_part, from 0
};
FFCL_HD inline Slots slots_of(const SumsPlan& p, bool is_col, int index, int begin, int end) {
  const int first = begin / p.side, last = ceil_div(end, p.side), own = index / p.side;
  Slots s;
  if (p.triangle) {
    if (index < end) s.first_row = own * p.shares, s.last_row = p.supers * p.shares;
    s.last_col = (least(own + 1, last) - first) * p.shares;
  } else if (is_col) {
    s.last_col = (last - first) * p.shares;
  } else {
    s.last_row = p.supers * p.shares;
  }
  return s;
}

// Sums of `rows` or `cols` exponentials 2^(t - c) <= 2^headroom stay finite; a sum under `lost` has lost too much to
// underflow: n terms lose at most n 2^-126, which 24 bits cannot show unless the sum is under n 2^-102.
struct Headroom {
  float headroom, lost;
};
inline Headroom headroom(int rows, int cols) {
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < most(rows, cols)) ++bits;
  float lost = 1.f;
  for (int i = bits; i < 102; ++i) lost *= 0.5f;
  return {126.f - bits, lost};
}

// ---------------------------------------------------------------------------------------------------------------------
// Layouts
// ---------------------------------------------------------------------------------------------------------------------

// Element e of a thread's fragment (m, n) of a product by mma or wgmma, whose 16 x 8 tiles are `apart` rows apart.
FFCL_HD inline int fragment_row(int lane, int m, int e, int apart) { return apart * m + lane / 4 + e / 2 * 8; }
FFCL_HD inline int fragment_col(int lane, int n, int e) { return 8 * n + lane % 4 * 2 + e % 2; }

// sm_80: a step is 32 deep, so a row has four 16-byte parts, moved about so that eight rows of one part lie in
// different banks. Bytes from the start of an operand's stage.
constexpr int STEP80 = 32, STAGES80 = 4, OPERAND80 = TILE * STEP80 * 2;
FFCL_HD inline int part_offset80(int row, int part) { return row * (STEP80 * 2) + ((part ^ (row / 2 % 4)) * 16); }

// The row and part whose address lane gives to ldmatrix: a 16 x 16 block of the left operand, or two 8 x 16 blocks of
// the right one.
FFCL_HD inline int left_row(int lane) { return lane / 8 % 2 * 8 + lane % 8; }
FFCL_HD inline int left_part(int lane) { return lane / 16; }
FFCL_HD inline int right_row(int lane) { return lane / 16 * 8 + lane % 8; }
FFCL_HD inline int right_part(int lane) { return lane / 8 % 2; }

constexpr int APART80 = 16;  // rows between a warp's fragments
constexpr int WARPS80 = 8;
// Row sums by column of warps, column sums by row of warps, after the stages of a product.
constexpr int PRODUCT_SHARED80 = STAGES80 * 2 * OPERAND80;
constexpr int SUMS_SHARED80 = PRODUCT_SHARED80 + (2 * MAX_SPAN * TILE + 4 * TILE) * 4;
constexpr int PANEL_PITCH = TILE * 2 + 16;  // bytes between rows of a tile of G on its way out
static_assert(TILE * PANEL_PITCH <= PRODUCT_SHARED80);
constexpr int ONLINE_SHARES = 8;  // threads that have pairs of a row: four of each of two warps
// After the stages halves of sums, then shares of a maximum and a sum.
constexpr int FINISH_SHARED80 = PRODUCT_SHARED80 + (2 * TILE + 2 * ONLINE_SHARES * TILE) * 4;
static_assert(SUMS_SHARED80 <= 99 << 10 && FINISH_SHARED80 <= 99 << 10, "sm_86 and sm_89 have no more");

// sm_90: a step is 64 deep, 128 bytes a row, which TMA writes and wgmma reads in the 128-byte swizzle. The place of an
// operand's step in shared memory is 16 KiB.
constexpr int APART90 = 64;
constexpr int STEP90 = 64, OPERAND90 = TILE * STEP90 * 2;
constexpr int PLACES90 = 13;
constexpr int THREADS90 = 128 * (1 + CONSUMERS90);
constexpr int BARRIERS90 = 256;  // bytes before the rest
constexpr int PANEL_SHARED90 = PLACES90 * OPERAND90 + BARRIERS90;
constexpr int SUMS_SHARED90 = PANEL_SHARED90 + CONSUMERS90 * (MAX_SPAN * TILE + 4 * TILE) * 4;
static_assert(SUMS_SHARED90 <= 227 << 10);

// wgmma's description of an operand at `address` of shared memory whose rows are 128 bytes, in the 128-byte swizzle:
// eight rows are 1024 bytes. 16 elements further along the depth are 32 bytes further.
FFCL_HD constexpr uint64_t swizzled_operand(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// What a cluster multiplies, in order: a super-tile's tiles of 128 x 256, down one column of tiles after the other. The
// half of a tile past the last column, or below the diagonal where the other half is not, is computed for nothing.
// Calls use(i, j, tiles of the column).
template <class Use>
FFCL_HD void walk_super_tile(const SumsPlan& p, const Mask& m, int end, int row, int col, Use use) {
  const int rows = least(p.span, ceil_div(end - row, TILE));
  FFCL_NO_UNROLL
  for (int j = 0; j < p.span / CLUSTER90 && col + j * CLUSTER90 * TILE < m.cols; ++j) {
    const int after = col + (j + 1) * CLUSTER90 * TILE;
    const int tiles = m.triangle ? least(rows, ceil_div(after - row, TILE)) : rows;
    FFCL_NO_UNROLL
    for (int i = 0; i < tiles; ++i) use(i, j, tiles);
  }
}

// The 128 x 256 tiles of a panel.
FFCL_HD inline int64_t panel_tiles(int height, int width) {
  return static_cast<int64_t>(ceil_div(height, TILE)) * ceil_div(width, CLUSTER90 * TILE);
}

// Tiles begin..end-1 of them, down one column of tiles after the other. Calls use(row, col, i, tiles): tile i of those
// of its column that are among them.
template <class Use>
FFCL_HD void walk_panel(int height, int width, int64_t begin, int64_t end, Use use) {
  const int down = ceil_div(height, TILE);
  int row = static_cast<int>(begin % down), col = static_cast<int>(begin / down), i = 0;
  int tiles = static_cast<int>(least<int64_t>(down - row, end - begin));
  FFCL_NO_UNROLL
  for (int64_t at = begin; at < end; ++at) {
    use(row * TILE, col * CLUSTER90 * TILE, i, tiles);
    ++row;
    if (++i == tiles) {
      row = i = 0;
      ++col;
      tiles = static_cast<int>(least<int64_t>(down, end - at - 1));
    }
  }
}

// How TMA sees (rows, dim) elements of two bytes: what cuTensorMapEncodeTiled is given.
struct TensorMapPlan {
  uint64_t sizes[2];  // elements, the depth first
  uint64_t strides[1];  // bytes between rows
  uint32_t box[2];
};
inline TensorMapPlan plan_tensor_map(int64_t rows, int64_t dim, int64_t stride, int box_rows) {
  return {{static_cast<uint64_t>(dim), static_cast<uint64_t>(rows)},
          {static_cast<uint64_t>(stride) * 2},
          {STEP90, static_cast<uint32_t>(box_rows)}};
}

}  // namespace ffcl
