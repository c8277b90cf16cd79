// How the CUDA kernels of the goodness family are cut into blocks: plain arithmetic, no CUDA, tested on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FFCL_HD __host__ __device__
#else
#define FFCL_HD
#endif
#ifdef __CUDA_ARCH__
#define FFCL_NO_UNROLL _Pragma("unroll 1")  // a loop whose body is all of a kernel
#else
#define FFCL_NO_UNROLL
#endif

namespace ffcl {

struct Chip {
  int capability = 0;  // 80, 90, 100
  int processors = 1;
  int shared = 0;  // bytes of shared memory that a block may ask for
};

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared = 0;  // dynamic shared memory, bytes
  int cluster = 1;     // blocks that share theirs
};

template <class Int>
FFCL_HD constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}
template <class Int>
FFCL_HD constexpr Int least(Int a, Int b) {
  return a < b ? a : b;
}
template <class Int>
FFCL_HD constexpr Int most(Int a, Int b) {
  return a > b ? a : b;
}

constexpr int GOODNESS_THREADS = 256;
constexpr int PART_BYTES = 64;  // a float for each warp of a block, at the start of its shared memory

// Rows a warp or a block each. `lanes`: threads a row.
inline Grid row_grid(int64_t rows, int lanes) {
  const int64_t each = GOODNESS_THREADS / lanes;
  return {ceil_div<int64_t>(rows, each), GOODNESS_THREADS, PART_BYTES, 1};
}

// ---------------------------------------------------------------------------------------------------------------------
// Pair cosine: where a sample's pair is kept between the sums and the gradients.
// ---------------------------------------------------------------------------------------------------------------------
struct PairPlan {
  int lanes = 32;   // threads a sample in each block: a warp, or all
  int cluster = 1;  // blocks a sample
  int share = 0;    // packs of each tensor that one block has; the last may have fewer
  int kept = 0;     // of those, packs in shared memory; the rest is read a second time
  Grid grid;
};

// The start of a block's shared memory: three sums of each of its warps, then of each block of the largest cluster.
constexpr int PAIR_PART_BYTES = 3 * 4 * (GOODNESS_THREADS / 32 + 8);

// packs: of `pack_bytes` in a sample of one tensor. `gradients`: without them nothing is kept.
inline PairPlan plan_pair(int64_t rows, int packs, int pack_bytes, bool gradients, const Chip& chip) {
  PairPlan p;
  const int64_t both = 2 * pack_bytes;
  // What a block has for samples where so many share a multiprocessor: the driver keeps 1 KiB of each.
  const auto room = [&](int blocks) -> int64_t { return (chip.shared + 1024) / blocks - 1024 - PAIR_PART_BYTES; };
  // A warp a sample while three blocks of eight samples share a multiprocessor.
  const bool narrow = packs <= 32 * 8 && 8 * both * packs <= room(3);
  p.lanes = narrow ? 32 : GOODNESS_THREADS;
  if (!narrow && chip.capability >= 90) {
    // Two blocks share a multiprocessor, and there are as many while a thread has two packs. A cluster of more than 8
    // is not portable.
    const auto crowded = [&] { return gradients && both * ceil_div(packs, p.cluster) > room(2); };
    const auto idle = [&] {
      return rows * p.cluster < 2 * chip.processors && packs / p.cluster >= 4 * GOODNESS_THREADS;
    };
    while (p.cluster < 8 && (crowded() || idle())) p.cluster *= 2;
  }
  p.share = ceil_div(packs, p.cluster);
  if (gradients) p.kept = static_cast<int>(least<int64_t>(p.share, room(1) / (narrow ? 8 * both : both)));
  const int samples = GOODNESS_THREADS / p.lanes;
  p.grid = {ceil_div<int64_t>(rows, samples) * p.cluster, GOODNESS_THREADS, PAIR_PART_BYTES + samples * p.kept * both,
            p.cluster};
  return p;
}

// Blocks that share a long row where each pack is by itself: as many as fill the chip, while each thread has `ahead`.
inline int row_parts(int64_t rows, int packs, int ahead, int processors) {
  const int64_t wanted = ceil_div<int64_t>(2 * processors, most<int64_t>(rows, 1));
  return static_cast<int>(most<int64_t>(1, least<int64_t>(wanted, packs / (ahead * GOODNESS_THREADS))));
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling: how the positions of a channel, or the channels of a position, are shared out.
// ---------------------------------------------------------------------------------------------------------------------
enum class PoolWay : int {
  warp = 0,    // channels first: a warp a channel
  staged = 1,  // channels first, few positions: channels are copied to shared memory, then a thread a channel
  last = 2,    // channels last: threads side by side along the channels, groups of them along the positions
};

constexpr int STAGED_CHANNELS = 128;
constexpr int STAGED_POSITIONS = 128;  // fewer than this

struct PoolPlan {
  PoolWay way = PoolWay::warp;
  int pack = 1;    // elements a load
  int parts = 1;   // blocks a sample
  int across = 1;  // `last`: packs of channels that a block has
  Grid grid;
};

// wide: elements in 16 bytes; `aligned`: the base and the samples' stride are multiples of 16 bytes.
inline PoolPlan plan_pool(int64_t samples, int channels, int positions, bool channels_last, int wide, bool aligned,
                          int processors) {
  PoolPlan p;
  const int bytes = 16 / wide;
  if (channels_last) {
    p.way = PoolWay::last;
    p.pack = aligned && channels % wide == 0 ? wide : 1;
    const int packs = channels / p.pack;
    p.across = least(packs, 32);
    // Few samples are cut further, as long as a block's part of a position has the two sectors of 32 bytes.
    while (samples * ceil_div(packs, p.across) < processors && (p.across + 1) / 2 * p.pack * bytes >= 64)
      p.across = (p.across + 1) / 2;
    p.parts = ceil_div(packs, p.across);
    p.grid = {samples * p.parts, GOODNESS_THREADS, static_cast<int64_t>(GOODNESS_THREADS) * p.pack * 4, 1};
    return p;
  }
  const bool whole = static_cast<int64_t>(channels) * positions % wide == 0;
  if (positions < STAGED_POSITIONS && aligned && whole) {
    p.way = PoolWay::staged;
    p.pack = wide;
    p.parts = ceil_div(channels, STAGED_CHANNELS);
    p.grid = {samples * p.parts, STAGED_CHANNELS, static_cast<int64_t>(STAGED_CHANNELS) * positions * bytes, 1};
    return p;
  }
  p.pack = aligned && positions % wide == 0 ? wide : 1;
  p.parts = ceil_div(channels, GOODNESS_THREADS / 32);
  p.grid = {samples * p.parts, GOODNESS_THREADS, PART_BYTES, 1};
  return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Many layers in one launch.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int MANY_LAYERS = 32;

struct ManyLayer {
  const void* h;
  void* dh;
  int64_t rows, stride, first_block, first_row;
  int dim, lanes;
};

struct ManyLayers {
  ManyLayer layer[MANY_LAYERS];
  int count;
};

// The layer of a block: the last whose first block is not after it.
FFCL_HD inline int layer_of(const ManyLayers& all, int64_t block) {
  int found = 0;
  for (int i = 1; i < all.count; ++i)
    if (all.layer[i].first_block <= block) found = i;
  return found;
}

// Fills in `lanes` and `first_block`; a row is a warp's while `kept` packs a lane hold it. Blocks in all.
inline int64_t plan_many(ManyLayers& all, int pack, int kept) {
  int64_t blocks = 0;
  for (int i = 0; i < all.count; ++i) {
    ManyLayer& l = all.layer[i];
    l.lanes = l.dim / pack <= 32 * kept ? 32 : GOODNESS_THREADS;
    l.first_block = blocks;
    blocks += row_grid(l.rows, l.lanes).blocks;
  }
  return blocks;
}

}  // namespace ffcl
