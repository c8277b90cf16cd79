// Contrastive similarity for compute capability 9.0: normalisers and pair gradients by TMA and wgmma. Compiled for
// sm_90a alone; what surrounds it is in similarity_sm80.cu.
//
// How it works: in each block one thread loads steps of 64 along the depth into shared memory; two warpgroups take
// turns at tiles of 128 x 128, so that one multiplies while the other is at its exponentials. Two blocks are a cluster:
// of one operand each loads half for both (TMA writes it to both), the other is a block's own. A place in shared memory
// is free again when the group that used it says so, to both blocks.
//
// Bound by: shared memory and tensor cores. For a step of a tile, 512 cycles of the tensor cores, a product reads 48
// KiB, and TMA writes what is new: of the 64 KiB that shared memory moves in that time, two new operands take all and a
// quarter more, one leaves enough. So columns are kept while rows pass. Below a width of 256 exp2 takes over.
#define FFCL_SM90A 1

#include <cuda.h>

#include "similarity_tile.cuh"

namespace ffcl {
namespace {

constexpr int MF = 2, NF = 16;  // a warpgroup has 128 x 128: two products of 64 x 128

// A place of the ring and the parity of the phase of its barriers that is waited for.
struct Place {
  int slot = 0, parity = 0;
};

// A step's operands, as wgmma's descriptions of them, and where in the ring they are.
struct Step {
  uint32_t rows, cols;
  int slot;
};

// What a block's shared memory holds of both operands: the columns of KEPT steps, for as many tiles as use them, and a
// ring of SLOTS through which the rest passes: of each step the rows, then, where there are MORE steps, the columns of
// those. Each place is 128 x 64 elements and has its barriers.
template <int KEPT, bool MORE>
struct Feed {
  static constexpr int SLOTS = PLACES90 - KEPT;
  int steps;
  unsigned char* kept = shared_memory();
  unsigned char* ring = kept + KEPT * OPERAND90;
  uint64_t* full = reinterpret_cast<uint64_t*>(ring + SLOTS * OPERAND90);
  uint64_t* empty = full + SLOTS;
  uint64_t* kept_full = empty + SLOTS;
  uint64_t* kept_empty = kept_full + KEPT;
  uint64_t* turn = kept_empty + KEPT;  // phase n ends when all steps of tile n have been waited for
  unsigned char* rest = ring + SLOTS * OPERAND90 + BARRIERS90;
  static_assert((2 * (SLOTS + KEPT) + 1) * 8 <= BARRIERS90);

  __device__ explicit Feed(int dim) : steps(ceil_div(dim, STEP90)) {}
  __device__ static bool stays(int step) { return !MORE || step < KEPT; }

  // All threads of the cluster call it.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < SLOTS; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, CLUSTER90 * 4);  // the warps of one group in each block
      }
      for (int i = 0; i < KEPT; ++i) {
        barrier_init(kept_full + i, 1);
        barrier_init(kept_empty + i, CONSUMERS90 * 4);
      }
      barrier_init(turn, 4);
      barriers_ready();
    }
    cluster_meet();
  }

  __device__ static void advance(Place& p) {
    if (++p.slot == SLOTS) p.slot = 0, p.parity ^= 1;
  }
  // Past a tile that is the other group's.
  __device__ void skip(Place& p) const {
    const int operands = MORE ? 2 * steps - KEPT : steps;
    p.slot += operands % SLOTS;
    p.parity ^= operands / SLOTS % 2;
    if (p.slot >= SLOTS) p.slot -= SLOTS, p.parity ^= 1;
  }

  // Brings what a tile of 128 rows of q and of k needs and does not stay from its column's last; the first of its
  // column of tiles `opens` it. The rows are for both blocks, of which each loads a half: q's boxes are half as high.
  __device__ void fill(Place& p, int column, bool opens, const CUtensorMap* q, int row, const CUtensorMap* k, int col,
                       unsigned rank) const {
    constexpr int HALF = TILE / CLUSTER90;
    for (int step = 0; step < steps; ++step) {
      const int depth = step * STEP90;
      if (opens && stays(step)) {
        barrier_wait(kept_empty + step, column % 2 ^ 1);
        barrier_expect(kept_full + step, OPERAND90);
        copy_box(kept + step * OPERAND90, k, kept_full + step, depth, col);
      }
      expect(p);
      copy_box_to((1u << CLUSTER90) - 1, ring + p.slot * OPERAND90 + rank * (OPERAND90 / CLUSTER90), q, full + p.slot,
                  depth, row + static_cast<int>(rank) * HALF);
      advance(p);
      if (!stays(step)) {
        expect(p);
        copy_box(ring + p.slot * OPERAND90, k, full + p.slot, depth, col);
        advance(p);
      }
    }
  }

  // Whether the operand at `p` is there, without waiting.
  __device__ bool arrived(const Place& p) const { return barrier_passed(full + p.slot, p.parity); }
  // Waits for a step's operands, of which the first may be known to have `arrived`. `fresh`: it is the first tile of
  // its column of tiles for this group.
  __device__ Step wait(Place& p, int step, int column, bool fresh, bool arrived) const {
    Step s{place_of(ring) + p.slot * PLACE90, place_of(kept) + step * PLACE90, p.slot};
    if (!arrived) barrier_wait(full + p.slot, p.parity);
    advance(p);
    if (!stays(step)) {
      s.cols = place_of(ring) + p.slot * PLACE90;
      barrier_wait(full + p.slot, p.parity);
      advance(p);
    } else if (fresh) {
      barrier_wait(kept_full + step, column % 2);
    }
    return s;
  }
  // Gives them back. Columns that stay are free when both groups have given them back after their last tile of the
  // column of tiles: `gives` is how many groups this tile is the last for, those included that have none.
  __device__ void release(const Step& s, int step, int gives) const {
    const unsigned lane = threadIdx.x % 32;
    if (lane < CLUSTER90) barrier_arrive(empty + s.slot, lane);
    if (!stays(step)) {
      if (lane < CLUSTER90) barrier_arrive(empty + (s.slot + 1 == SLOTS ? 0 : s.slot + 1), lane);
    } else if (static_cast<int>(lane) < gives) {
      barrier_arrive(kept_empty + step);
    }
  }
  // Lets the other group wait, when all of this one's threads have done so.
  __device__ void pass_turn() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(turn);
  }

 private:
  static constexpr uint32_t PLACE90 = OPERAND90 / 16;  // in descriptions, which count 16 bytes
  __device__ static uint32_t place_of(const unsigned char* p) {
    return static_cast<uint32_t>(swizzled_operand(shared_address(p)));
  }
  __device__ void expect(const Place& p) const {
    barrier_wait(empty + p.slot, p.parity ^ 1);
    barrier_expect(full + p.slot, OPERAND90);
  }
};

// acc = the product of tile n: tile i of `tiles` in the `column`-th column of tiles.
//
// The tensor cores have a product or two in store and idle where a warp takes longer than those to issue the next: so
// little is computed between them, what is the same for a warp in uniform registers, and whether the next step has come
// is asked before a step's last products. (Waiting there would be a branch, before which the compiler ends the group.)
// A barrier tells only the parity of its phase, so nobody may wait for a place's next phase but one: the groups take
// turns, and each starts when the other has waited for all that came before.
template <class T, int KEPT, bool MORE>
__device__ __forceinline__ void product90(float (&acc)[MF][NF][4], const Feed<KEPT, MORE>& feed, Place& place,
                                          unsigned n, int column, int i, int tiles) {
  const bool fresh = i < CONSUMERS90;
  const int gives = i + CONSUMERS90 < tiles ? 0 : tiles < CONSUMERS90 ? CONSUMERS90 : 1;
  constexpr uint64_t WAY = swizzled_operand(0) >> 32 << 32;
  constexpr int DEPTHS = STEP90 / 16;
  if (n > 0) barrier_wait(feed.turn, (n - 1) % 2);
  Step now = feed.wait(place, 0, column, fresh, false), before = now;
  FFCL_NO_UNROLL
  for (int step = 0; step < feed.steps; ++step) {
    bool arrived = false;
    if (step + 1 == feed.steps) feed.pass_turn();
    products_begin();
#pragma unroll
    for (int depth = 0; depth < DEPTHS; ++depth) {
      if (depth == DEPTHS - 1) arrived = feed.arrived(place);
#pragma unroll
      for (int m = 0; m < MF; ++m)
        multiply_group(acc[m], WAY | (now.rows + m * (OPERAND90 / MF / 16) + depth * 2), WAY | (now.cols + depth * 2),
                       step > 0 || depth > 0, T());
    }
    products_commit();
    if (step > 0) {
      products_wait<1>();
      feed.release(before, step - 1, gives);
    }
    before = now;
    if (step + 1 < feed.steps) now = feed.wait(place, step + 1, column, fresh, arrived);
  }
  products_wait<0>();
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int n = 0; n < NF; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) settle(acc[m][n][e]);
  feed.release(before, feed.steps - 1, gives);
}

// One value in all threads of a warp, which the compiler then knows.
template <class X>
__device__ __forceinline__ X uniform(X x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// A cluster walks down columns of 128 x 256 tiles, of which each block has its own 128 columns; rows are loaded for
// both. The groups of a block have every second tile of its column each. One exp2 an element feeds both sums: those of
// columns stay in a group's registers down the column, those of rows in shared memory, an array for each group.
template <class T, int KEPT, bool MORE>
__global__ void __launch_bounds__(THREADS90, 1)
    sums90(__grid_constant__ const SumsArgs a, __grid_constant__ const CUtensorMap q_map,
           __grid_constant__ const CUtensorMap k_map) {
  const Feed<KEPT, MORE> feed(a.dim);
  feed.begin();
  const unsigned rank = cluster_rank();
  const Cell cell = super_of(a.plan, blockIdx.x / CLUSTER90, a.begin, a.end);
  const Exponent x = exponent_of(a.scale, a.norms, a.headroom);
  const bool active = uniform<int>(cell.col >= 0 && cell.col < a.plan.supers && x.bound <= BOUND_LIMIT);
  const int row = cell.row * a.plan.side, col = cell.col * a.plan.side;
  const int own = col + static_cast<int>(rank) * TILE;
  const int group = uniform(static_cast<int>(threadIdx.x) / 128) - 1;
  if (group < 0) {
    fewer_registers<40>();
    if (active && threadIdx.x == 0) {
      Place place;
      walk_super_tile(a.plan, a.mask, a.end, row, col, [&](int i, int j, int) {
        feed.fill(place, j, i == 0, &q_map, row + i * TILE, &k_map, own + j * CLUSTER90 * TILE, rank);
      });
    }
    __syncwarp();
  } else {
    more_registers<232>();
    if (active) {
      constexpr int ROWS = MAX_SPAN * TILE;
      const int thread = threadIdx.x % 128, warp = uniform(thread / 32);
      float* row_sums = reinterpret_cast<float*>(feed.rest);  // (CONSUMERS90, ROWS)
      float* col_shares = row_sums + CONSUMERS90 * ROWS + group * 4 * TILE;  // (CONSUMERS90, 4, TILE)
      for (int i = thread; i < ROWS; i += 128) row_sums[group * ROWS + i] = 0.f;
      meet(1 + group, 128);
      float acc[MF][NF][4], col_sums[NF][2] = {};
      Place place;
      unsigned n = 0;
      auto close = [&](int at) {
        put_col_sums(col_sums, col_shares + warp * TILE);
        meet(1 + group, 128);
        if (at + thread < a.mask.cols) {
          float sum = 0.f;
          for (int w = 0; w < 4; ++w) sum += col_shares[w * TILE + thread];
          const int slot = (cell.row - a.begin / a.plan.side) * CONSUMERS90 + group;
          a.col_part[static_cast<int64_t>(slot) * a.mask.cols + at + thread] = sum;
        }
        meet(1 + group, 128);
      };
      walk_super_tile(a.plan, a.mask, a.end, row, col, [&](int i, int j, int tiles) {
        const int r = row + i * TILE, at = own + j * CLUSTER90 * TILE;
        if (static_cast<int>(n % CONSUMERS90) == group) {
          product90<T>(acc, feed, place, n, j, i, tiles);
          exponentials<APART90>(acc, a.mask, needs_mask(a.mask, r, at, TILE, TILE), r + 16 * warp, at, x);
          add_sums<APART90>(acc, row_sums + group * ROWS + i * TILE + 16 * warp, col_sums);
        } else {
          feed.skip(place);
        }
        ++n;
        if (i == tiles - 1 && a.both) close(at);
      });
      meet(1 + CONSUMERS90, 128 * CONSUMERS90);
      const int64_t slot = static_cast<int64_t>(cell.col) * CLUSTER90 + rank;
      for (int i = threadIdx.x - 128; i < a.plan.side && row + i < a.end; i += 128 * CONSUMERS90)
        a.row_part[slot * (a.end - a.begin) + (row + i - a.begin)] = row_sums[i] + row_sums[ROWS + i];
    }
  }
  cluster_meet();  // a block must not end while the other writes to its shared memory
}

// Tiles of G, from registers to the panel. The grid is as large as the chip; clusters share out the panel's columns of
// 128 x 256 tiles, one below the other, and walk them as the sums do. What the columns bring to the pairs stays in
// registers down the column, what the rows bring is asked for before the product.
template <class T, int KEPT, bool MORE>
__global__ void __launch_bounds__(THREADS90, 1)
    panel90(__grid_constant__ const PanelArgs a, __grid_constant__ const CUtensorMap q_map,
            __grid_constant__ const CUtensorMap k_map) {
  const Feed<KEPT, MORE> feed(a.dim);
  feed.begin();
  const unsigned rank = cluster_rank();
  const int height = a.row_end - a.row_begin, width = a.col_end - a.col_begin, own = static_cast<int>(rank) * TILE;
  const int group = uniform(static_cast<int>(threadIdx.x) / 128) - 1;
  const int64_t cluster = blockIdx.x / CLUSTER90, clusters = gridDim.x / CLUSTER90, tiles = panel_tiles(height, width);
  const int64_t begin = uniform(tiles * cluster / clusters), end = uniform(tiles * (cluster + 1) / clusters);
  if (group < 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      Place place;
      int column = -1;
      walk_panel(height, width, begin, end, [&](int row, int col, int i, int) {
        column += i == 0;
        feed.fill(place, column, i == 0, &q_map, a.row_begin + row, &k_map, a.col_begin + col + own, rank);
      });
    }
    __syncwarp();
  } else {
    more_registers<232>();
    const int warp = uniform(static_cast<int>(threadIdx.x) % 128 / 32);
    const float factor = *a.scale * LOG2E;
    const bool both = a.cols.at, apart = uniform<int>(a.needs_two());
    float acc[MF][NF][4];
    RowTerms<MF> rows;
    ColTerms<NF> cols;
    Place place;
    unsigned n = 0;
    int column = -1;
    walk_panel(height, width, begin, end, [&](int row, int col, int i, int tiles) {
      column += i == 0;
      if (static_cast<int>(n % CONSUMERS90) == group) {
        const int r = a.row_begin + row, c = a.col_begin + col + own;
        if (!apart) rows.load(a.rows, r + 16 * warp, APART90, both, a.frame);
        if (!apart && i < CONSUMERS90) cols.load(a.cols, c, both);
        product90<T>(acc, feed, place, n, column, i, tiles);
        pair_gradients<APART90>(acc, a, apart, rows, cols, factor, r, c, 16 * warp, 0);
        store_fragment<T, APART90>(acc, a.panel, a.stride, row + 16 * warp, col + own, height, width);
      } else {
        feed.skip(place);
      }
      ++n;
    });
  }
  cluster_meet();
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

// The driver's function that describes a tensor to TMA: this module does not link against the driver.
int encode(CUtensorMap& map, DType dtype, const void* x, int64_t rows, int dim, int64_t stride, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return status_of(error);
  if (found != cudaDriverEntryPointSuccess || !address) return status_of(cudaErrorNotSupported);
  const TensorMapPlan p = plan_tensor_map(rows, dim, stride, box_rows);
  const cuuint64_t sizes[2] = {p.sizes[0], p.sizes[1]}, strides[1] = {p.strides[0]};
  const cuuint32_t box[2] = {p.box[0], p.box[1]}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(address)(
      &map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? ok : cuda_error_base + static_cast<int>(result);
}

template <class Args, class Launch>
int with_maps(const Args& a, int dtype, Launch launch_with) {
  CUtensorMap q, k;
  const DType type = static_cast<DType>(dtype);
  int status = encode(q, type, a.q, a.mask.rows, a.dim, a.q_stride, TILE / CLUSTER90);
  if (status == ok) status = encode(k, type, a.k, a.mask.cols, a.dim, a.k_stride, TILE);
  if (status != ok) return status;
  if (type == DType::bfloat16) return launch_with(q, k, __nv_bfloat16());
  return launch_with(q, k, __half());
}

// Calls launch_with(Kept<KEPT, MORE>()) for an embedding of `dim`: columns stay where all of them fit; else half of
// what would, since a ring that takes two operands a step has to be longer.
template <int COUNT, bool REST>
struct Kept {
  static constexpr int KEPT = COUNT;
  static constexpr bool MORE = REST;
};
template <class Launch>
int with_kept(int dim, Launch launch_with) {
  if (dim <= 4 * STEP90) return launch_with(Kept<4, false>());
  if (dim <= 8 * STEP90) return launch_with(Kept<8, false>());
  return launch_with(Kept<4, true>());
}

}  // namespace

bool sm90_built() { return true; }

int sums_sm90(const SumsArgs& a, int dtype, int64_t clusters, void* stream) {
  const Grid grid{clusters * CLUSTER90, THREADS90, SUMS_SHARED90, CLUSTER90};
  return with_maps(a, dtype, [&](const CUtensorMap& q, const CUtensorMap& k, auto type) {
    return with_kept(
        a.dim, [&](auto kept) { return launch(sums90<decltype(type), kept.KEPT, kept.MORE>, grid, stream, a, q, k); });
  });
}

int panel_sm90(const PanelArgs& a, int dtype, int processors, void* stream) {
  const int64_t tiles = panel_tiles(a.row_end - a.row_begin, a.col_end - a.col_begin);
  const int64_t clusters = most<int64_t>(1, least<int64_t>(tiles, processors / CLUSTER90));
  const Grid grid{clusters * CLUSTER90, THREADS90, PANEL_SHARED90, CLUSTER90};
  return with_maps(a, dtype, [&](const CUtensorMap& q, const CUtensorMap& k, auto type) {
    return with_kept(
        a.dim, [&](auto kept) { return launch(panel90<decltype(type), kept.KEPT, kept.MORE>, grid, stream, a, q, k); });
  });
}

}  // namespace ffcl
