// What the panels of pair gradients read of normalisers and their gradients, on every chip.
#include "cuda_launch.cuh"
#include "similarity_cuda.h"
#include "similarity_plan.h"

namespace ffcl {
namespace {

constexpr int THREADS = 256, EACH = 4;  // elements of a thread, THREADS apart
constexpr int WARP_BYTES = THREADS / 32 * 3 * static_cast<int>(sizeof(float));
// One exponential serves both sides while all normalisers lie within SPREAD powers of two of each other: halfway
// between them no weight and no exponential leaves float32. And while they are under LARGE: beyond, a rounded exponent
// can make a probability of 1 a much larger number, which only a side's own exponential shows.
constexpr float SPREAD = 120.f, LARGE = 65536.f;

// The smallest and largest finite normaliser and the largest finite weight. In any order the same.
struct Range {
  float low = INFINITY, high = -INFINITY, weight = 0.f;

  __device__ void add(const Range& other) {
    low = fminf(low, other.low);
    high = fmaxf(high, other.high);
    weight = fmaxf(weight, other.weight);
  }
};

// A block's range, in all of its threads. Once a kernel: no barrier ends it.
__device__ inline Range over_block(Range mine) {
  for (int step = 16; step; step /= 2)
    mine.add({__shfl_xor_sync(0xffffffffu, mine.low, step), __shfl_xor_sync(0xffffffffu, mine.high, step),
              __shfl_xor_sync(0xffffffffu, mine.weight, step)});
  Range* warps = reinterpret_cast<Range*>(shared_memory());
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; ++i) mine.add(warps[i]);
  return mine;
}

static_assert(WARP_BYTES == THREADS / 32 * sizeof(Range), "ranges of warps");

__device__ inline void widen(Range& range, const Normalisers& side) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < side.n;
       i += static_cast<int64_t>(gridDim.x) * THREADS) {
    const float lse = side.lse[i], weight = fabsf(side.grad[i]);
    const bool finite = fabsf(lse) < INFINITY;
    range.add({finite ? lse : INFINITY, finite ? lse : -INFINITY, weight < INFINITY ? weight : 0.f});
  }
}

// How it works: blocks stride over rows, then columns; each leaves its range. Bound by the launch: 8 bytes a row.
__global__ void __launch_bounds__(THREADS) ranges_of(Normalisers rows, Normalisers cols, float* ranges) {
  Range mine;
  widen(mine, rows);
  widen(mine, cols);
  mine = over_block(mine);
  if (threadIdx.x == 0) reinterpret_cast<Range*>(ranges)[blockIdx.x] = mine;
}

// The vectors of one row. A normaliser of -inf has no weight and a shift of +inf; one of +inf or NaN stays what it is,
// and other rows do not see it.
__device__ inline void write_vectors(const Normalisers& side, int64_t i, float centre, float weight_unit, double unit) {
  const float lse = side.lse[i];
  const bool empty = lse == -INFINITY, finite = fabsf(lse) < INFINITY;
  double exact = finite ? lse : 0.f;
  // Beyond, the last bit of a float (of two) is worth more than a power of two, and says nothing.
  double known = 8388608.0;
  if (side.rests) {
    exact += finite ? side.rests[i] : 0.f;
    known *= known;
  }
  exact *= unit;
  const float shift = finite || empty ? static_cast<float>(exact) : lse;
  const float lost = finite && fabs(exact) < known ? static_cast<float>(shift - exact) : 0.f;
  // What rounding takes from the shift goes into the weight.
  const float weight = empty ? 0.f : side.grad[i] * weight_unit * exp2f(lost);
  side.vectors[i] = weight;
  side.vectors[side.n + i] = empty ? INFINITY : shift;
  side.vectors[2 * side.n + i] = empty ? 0.f : weight * exp2f(centre - shift);
}

// How it works: every block puts the ranges together for itself. Block 0 leaves the frame. Bound by the launch: 24
// bytes a row.
__global__ void __launch_bounds__(THREADS)
    vectors_of(Normalisers rows, Normalisers cols, const float* scale, float gain, const float* ranges, int count,
               int row_blocks, float* frame) {
  // By the factor that the panels use, which is not quite log2 e.
  const double unit = *scale == 0.f ? 1.4426950408889634 : static_cast<double>(*scale * LOG2E) / *scale;
  Range all;
  for (int i = threadIdx.x; i < count; i += THREADS) all.add(reinterpret_cast<const Range*>(ranges)[i]);
  all = over_block(all);
  const float low = static_cast<float>(all.low * unit), high = static_cast<float>(all.high * unit);
  // Weights come near to gain, as far as gain / largest is a float.
  const float largest = all.weight > 0.f ? fmaxf(all.weight, gain * 0x1p-126f) : 1.f;
  const float centre = low <= high ? 0.5f * (low + high) : 0.f;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    frame[0] = centre;
    frame[1] = high - low <= SPREAD && fmaxf(high, -low) < LARGE ? 1.f : 0.f;
    frame[2] = *scale * (largest / gain);
  }
  const bool of_cols = static_cast<int>(blockIdx.x) >= row_blocks;
  const Normalisers side = of_cols ? cols : rows;  // a reference would put both on the stack
  const int64_t first = static_cast<int64_t>(blockIdx.x - (of_cols ? row_blocks : 0)) * (THREADS * EACH) + threadIdx.x;
  for (int64_t i = first; i < least<int64_t>(side.n, first + THREADS * EACH); i += THREADS)
    write_vectors(side, i, centre, gain / largest, unit);
}

bool sensible(const Normalisers& side) {
  return side.n >= 0 && side.n <= INT_MAX && (!side.n || (side.lse && side.grad && side.vectors));
}

}  // namespace

int similarity_vectors_cuda(const Normalisers& rows, const Normalisers& cols, const float* scale, double gain,
                            float* ranges, float* frame, int device, void* stream) {
  if (!sensible(rows) || !sensible(cols) || !rows.n || !scale || !(gain > 0) || !ranges || !frame) return bad_argument;
  OnDevice guard(device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  const int64_t row_blocks = ceil_div<int64_t>(rows.n, THREADS * EACH);
  const int64_t blocks = row_blocks + ceil_div<int64_t>(cols.n, THREADS * EACH);
  const int64_t count = least<int64_t>(blocks, VECTOR_RANGES);
  const int status = launch(ranges_of, Grid{count, THREADS, WARP_BYTES, 1}, stream, rows, cols, ranges);
  if (status != ok) return status;
  return launch(vectors_of, Grid{blocks, THREADS, WARP_BYTES, 1}, stream, rows, cols, scale, static_cast<float>(gain),
                ranges, static_cast<int>(count), static_cast<int>(row_blocks), frame);
}

}  // namespace ffcl
