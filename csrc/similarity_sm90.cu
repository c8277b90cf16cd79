// Contrastive similarity for compute capability 9.0: normalisers and pair gradients by TMA and wgmma. Compiled for
// sm_90a alone; what surrounds it is in similarity_sm80.cu.
//
// How it works: a cluster of two blocks multiplies tiles of 256 x 128. In each block one thread loads steps of 64 along
// the depth into a ring of stages, its own rows and half of the columns, which TMA writes to both blocks; two
// warpgroups take turns at the tiles, so that one multiplies while the other is at its exponentials. A stage is free
// again when the group that used it says so, to both blocks. Bound by: tensor cores; below a width of 128, exp2.
#define FFCL_SM90A 1

#include <cuda.h>

#include "similarity_tile.cuh"

namespace ffcl {
namespace {

constexpr int MF = 2, NF = 16;  // a warpgroup has 128 x 128: two products of 64 x 128

// The ring of stages in shared memory and its barriers.
template <int STAGES>
struct Ring {
  unsigned char* stages = shared_memory();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared_memory() + STAGES * 2 * OPERAND90);
  uint64_t* empty = full + STAGES;
  uint64_t* turn = empty + STAGES;  // phase n ends when all steps of tile n have been waited for
  unsigned char* rest = shared_memory() + STAGES * 2 * OPERAND90 + BARRIERS90;

  // All threads of the cluster call it.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; ++s) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, CLUSTER90 * 4);  // the warps of one group in each block
      }
      barrier_init(turn, 4);
      barriers_ready();
    }
    cluster_meet();
  }
  __device__ unsigned char* rows(unsigned count) const { return stages + count % STAGES * (2 * OPERAND90); }
  __device__ unsigned char* cols(unsigned count) const { return rows(count) + OPERAND90; }

  // Loads step `count` of all: rows from `row` and columns from `col` at a depth.
  __device__ void load(unsigned count, const CUtensorMap* q, const CUtensorMap* k, int row, int col, int depth,
                       unsigned rank) const {
    const int s = static_cast<int>(count % STAGES), round = static_cast<int>(count / STAGES % 2);
    barrier_wait(empty + s, round ^ 1);
    barrier_expect(full + s, 2 * OPERAND90);
    copy_box(rows(count), q, full + s, depth, row);
    constexpr int HALF = TILE / CLUSTER90;
    copy_box_to((1u << CLUSTER90) - 1, cols(count) + rank * (OPERAND90 / CLUSTER90), k, full + s, depth,
                col + static_cast<int>(rank) * HALF);
  }
  __device__ void wait(unsigned count) const {
    barrier_wait(full + count % STAGES, static_cast<int>(count / STAGES % 2));
  }
  __device__ void release(unsigned count) const {
    if (threadIdx.x % 32 < CLUSTER90) barrier_arrive(empty + count % STAGES, threadIdx.x % 32);
  }
};

// acc = this block's 128 rows times the 128 columns of tile `n`, whose steps are n * steps, ... of the ring.
//
// A barrier tells only the parity of its phase, so nobody may wait for a stage's next phase but one: the groups take
// turns, and each starts when the other has waited for all that came before.
template <class T, int STAGES>
__device__ __forceinline__ void product90(float (&acc)[MF][NF][4], const Ring<STAGES>& ring, unsigned n, int steps,
                                          unsigned rank) {
  const unsigned first = n * steps;
  if (n > 0) barrier_wait(ring.turn, (n - 1) % 2);
  for (int step = 0; step < steps; ++step) {
    const unsigned count = first + step;
    ring.wait(count);
    const uint32_t left = shared_address(ring.rows(count)), right = shared_address(ring.cols(count));
    products_begin();
#pragma unroll
    for (int depth = 0; depth < STEP90 / 16; ++depth)
#pragma unroll
      for (int m = 0; m < MF; ++m)
        multiply_group(acc[m], swizzled_operand(left + m * (OPERAND90 / MF) + depth * 32),
                       swizzled_operand(right + depth * 32), step > 0 || depth > 0, T());
    products_commit();
    if (step > 0) {
      products_wait<1>();
      ring.release(count - 1);
    }
  }
  // Before the products are done, so that the other group's queue up behind them and the tensor cores never idle.
  if (threadIdx.x % 32 == 0) barrier_arrive(ring.turn, rank);
  products_wait<0>();
#pragma unroll
  for (int m = 0; m < MF; ++m)
#pragma unroll
    for (int n = 0; n < NF; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) settle(acc[m][n][e]);
  ring.release(first + steps - 1);
}

// One exp2 an element feeds both sums: column sums stay in a group's registers down its column of tiles, row sums in
// shared memory, an array for each group.
template <class T>
__global__ void __launch_bounds__(THREADS90, 1)
    sums90(__grid_constant__ const SumsArgs a, __grid_constant__ const CUtensorMap q_map,
           __grid_constant__ const CUtensorMap k_map) {
  const Ring<SUMS_STAGES90> ring;
  ring.begin();
  const unsigned rank = cluster_rank();
  const Cell cell = super_of(a.plan, blockIdx.x / CLUSTER90, a.begin, a.end);
  const Exponent x = exponent_of(a.scale, a.norms, a.headroom);
  const bool active = cell.col >= 0 && cell.col < a.plan.supers && x.bound <= BOUND_LIMIT;
  const int row = cell.row * a.plan.side, col = cell.col * a.plan.side;
  const int steps = ceil_div(a.dim, STEP90), own = static_cast<int>(rank) * TILE;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  if (group < 0) {
    fewer_registers<40>();
    if (active && threadIdx.x == 0) {
      unsigned count = 0;
      walk_super_tile(a.plan, a.mask, a.end, row, col, [&](int i, int j, int) {
        for (int step = 0; step < steps; ++step)
          ring.load(count++, &q_map, &k_map, row + i * CLUSTER90 * TILE + own, col + j * TILE, step * STEP90, rank);
      });
    }
    __syncwarp();
  } else {
    more_registers<232>();
    if (active) {
      constexpr int ROWS = MAX_SPAN / CLUSTER90 * TILE;
      const int thread = threadIdx.x % 128, warp = thread / 32;
      float* row_sums = reinterpret_cast<float*>(ring.rest);  // (CONSUMERS90, ROWS)
      float* col_shares = row_sums + CONSUMERS90 * ROWS + group * 4 * TILE;  // (CONSUMERS90, 4, TILE)
      for (int i = thread; i < ROWS; i += 128) row_sums[group * ROWS + i] = 0.f;
      meet(1 + group, 128);
      float acc[MF][NF][4], col_sums[NF][2] = {};
      unsigned tile = 0;
      int open = -1;  // the column of tiles whose sums are in col_sums
      auto close = [&] {
        if (open < 0 || !a.both) return;
        put_col_sums(col_sums, col_shares + warp * TILE);
        meet(1 + group, 128);
        const int at = col + open * TILE + thread;
        if (at < a.mask.cols) {
          float sum = 0.f;
          for (int w = 0; w < 4; ++w) sum += col_shares[w * TILE + thread];
          const int slot = (cell.row - a.begin / a.plan.side) * CLUSTER90 + static_cast<int>(rank);
          a.col_part[static_cast<int64_t>(slot) * a.mask.cols + at] = sum;
        }
        meet(1 + group, 128);
      };
      walk_super_tile(a.plan, a.mask, a.end, row, col, [&](int i, int j, int w) {
        if (w == group) {
          if (j != open) close();
          open = j;
          product90<T>(acc, ring, tile, steps, rank);
          const int r = row + i * CLUSTER90 * TILE + own, at = col + j * TILE;
          exponentials<APART90>(acc, a.mask, needs_mask(a.mask, r, at, TILE, TILE), r + 16 * warp, at, x);
          add_sums<APART90>(acc, row_sums + group * ROWS + i * TILE + 16 * warp, col_sums);
        }
        ++tile;
      });
      close();
      meet(1 + CONSUMERS90, 128 * CONSUMERS90);
      for (int i = threadIdx.x - 128; i < a.plan.side / CLUSTER90; i += 128 * CONSUMERS90) {
        const int r = row + i / TILE * CLUSTER90 * TILE + own + i % TILE;
        if (r < a.end)
          a.row_part[static_cast<int64_t>(cell.col) * (a.end - a.begin) + (r - a.begin)] =
              row_sums[i] + row_sums[ROWS + i];
      }
    }
  }
  cluster_meet();  // a block must not end while the other writes to its shared memory
}

// Tiles of G, through shared memory to the panel; the grid is as large as the chip and the groups take turns.
template <class T>
__global__ void __launch_bounds__(THREADS90, 1)
    panel90(__grid_constant__ const PanelArgs a, __grid_constant__ const CUtensorMap q_map,
            __grid_constant__ const CUtensorMap k_map) {
  const Ring<PANEL_STAGES90> ring;
  ring.begin();
  const unsigned rank = cluster_rank();
  const int height = a.row_end - a.row_begin, width = a.col_end - a.col_begin;
  const int steps = ceil_div(a.dim, STEP90), own = static_cast<int>(rank) * TILE;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  const int64_t cluster = blockIdx.x / CLUSTER90, clusters = gridDim.x / CLUSTER90;
  if (group < 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      unsigned count = 0;
      walk_panel(height, width, cluster, clusters, [&](int row, int col, int) {
        for (int step = 0; step < steps; ++step)
          ring.load(count++, &q_map, &k_map, a.row_begin + row + own, a.col_begin + col, step * STEP90, rank);
      });
    }
    __syncwarp();
  } else {
    more_registers<232>();
    const int thread = threadIdx.x % 128, warp = thread / 32;
    unsigned char* tile = ring.rest + group * TILE * PANEL_PITCH;
    const float factor = *a.scale * LOG2E;
    float acc[MF][NF][4];
    unsigned number = 0;
    walk_panel(height, width, cluster, clusters, [&](int row, int col, int w) {
      if (w == group) {
        product90<T>(acc, ring, number, steps, rank);
        const int r = a.row_begin + row + own, c = a.col_begin + col;
        pair_gradients<APART90>(acc, a.mask, needs_mask(a.mask, r, c, TILE, TILE), r + 16 * warp, c, factor, a.rows,
                                a.cols, a.frame);
        stage_tile<T, APART90>(acc, tile, 16 * warp, 0);
        meet(1 + group, 128);
        store_tile(tile, a.panel, a.stride, row + own, col, height, width, thread, 128);
        meet(1 + group, 128);
      }
      ++number;
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
  int status = encode(q, type, a.q, a.mask.rows, a.dim, a.q_stride, TILE);
  if (status == ok) status = encode(k, type, a.k, a.mask.cols, a.dim, a.k_stride, TILE / CLUSTER90);
  if (status != ok) return status;
  if (type == DType::bfloat16) return launch_with(q, k, __nv_bfloat16());
  return launch_with(q, k, __half());
}

}  // namespace

bool sm90_built() { return true; }

int sums_sm90(const SumsArgs& a, int dtype, int64_t clusters, void* stream) {
  return with_maps(a, dtype, [&](const CUtensorMap& q, const CUtensorMap& k, auto type) {
    const Grid grid{clusters * CLUSTER90, THREADS90, SUMS_SHARED90, CLUSTER90};
    return launch(sums90<decltype(type)>, grid, stream, a, q, k);
  });
}

int panel_sm90(const PanelArgs& a, int dtype, int processors, void* stream) {
  return with_maps(a, dtype, [&](const CUtensorMap& q, const CUtensorMap& k, auto type) {
    const int64_t tiles =
        ceil_div<int64_t>(a.row_end - a.row_begin, CLUSTER90 * TILE) * ceil_div<int64_t>(a.col_end - a.col_begin, TILE);
    const int64_t clusters = most<int64_t>(1, least<int64_t>(tiles, processors / CLUSTER90));
    return launch(panel90<decltype(type)>, Grid{clusters * CLUSTER90, THREADS90, PANEL_SHARED90, CLUSTER90}, stream, a,
                  q, k);
  });
}

}  // namespace ffcl
