// Pair cosine loss and its gradient for CUDA; contract in goodness.h.
#include "goodness.h"
#include "goodness_cuda.h"
#include "goodness_rows.cuh"

namespace ffcl {
namespace {

struct Pair {
  int64_t rows, stride_1, stride_2;
  int dim;
  bool relu;
};

// The gradient with respect to h: nothing where ReLU cut it.
template <class T>
__device__ T masked(float h, float grad, bool relu) {
  T x;
  assign(x, relu && h <= 0.f ? 0.f : grad);
  return x;
}

// A pack from global to shared memory: in the background where it is 16 bytes.
template <class T, int N>
__device__ void keep(Pack<T, N>* to, const T* from) {
  if constexpr (sizeof(*to) == 16)
    copy16_async(to, from, true);
  else
    *to = Pack<T, N>::load(from);
}

// d1 = c0 a2 - c1 a1 and d2 = c0 a1 - c2 a2 of one pack; either may be null.
template <class T, int N>
__device__ void write_gradients(const Pack<T, N>& p1, const Pack<T, N>& p2, const float (&c)[3], bool relu, T* d1,
                                T* d2) {
  Pack<T, N> g1, g2;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float h1 = to_float(p1.x[j]), h2 = to_float(p2.x[j]);
    const float a1 = activation(h1, relu), a2 = activation(h2, relu);
    g1.x[j] = masked<T>(h1, c[0] * a2 - c[1] * a1, relu);
    g2.x[j] = masked<T>(h2, c[0] * a1 - c[2] * a2, relu);
  }
  if (d1) store_global(g1, d1);
  if (d2) store_global(g2, d2);
}

constexpr int BATCHES = 4;  // of copies to shared memory: the first is summed while the last is under way

__device__ void wait_for_batch(int b) {
  switch (b) {
    case 0: return copies_wait<3>();
    case 1: return copies_wait<2>();
    case 2: return copies_wait<1>();
    default: return copies_wait<0>();
  }
}

// The three sums over all threads of a sample, in all of them and in one order. In a cluster every block writes its own
// to all others' shared memory, so that none reads from another: `part` has PAIR_PART_BYTES.
template <int LANES>
__device__ void add_up(float (&sums)[3], float* part, int blocks, unsigned rank) {
  constexpr int WARPS = GOODNESS_THREADS / 32;
#pragma unroll
  for (float& sum : sums) sum = warp_sum(sum);
  if constexpr (LANES == 32) return;
  auto gather = [&](const float* from, int count) {
#pragma unroll
    for (float& sum : sums) sum = 0.f;
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[j] += from[3 * i + j];
  };
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int j = 0; j < 3; ++j) part[threadIdx.x / 32 * 3 + j] = sums[j];
  }
  __syncthreads();
  gather(part, WARPS);
  if (blocks == 1) return;
  float* shares = part + 3 * WARPS;  // of each block of the cluster
  if (threadIdx.x < blocks) {
    float* to = in_block(shares, threadIdx.x) + 3 * rank;
#pragma unroll
    for (int j = 0; j < 3; ++j) to[j] = sums[j];
  }
  cluster_meet();
  gather(shares, blocks);
}

// How it works: a warp, a block or a cluster of blocks has a sample. All of its pair that shared memory holds is asked
// for at once, 16 bytes a copy, and summed as it arrives; the same thread finds it there again for the gradients, so
// that no thread reads what another wrote but the three sums. In a cluster each block has a share of the sample. What
// shared memory cannot hold is read a second time.
// Bound by memory: two reads, two writes. For 4.8 TB/s a multiprocessor needs some 30 KiB under way; loads by way of
// registers left two a thread, 16 KiB.
template <class T, int N, int LANES>
__global__ void __launch_bounds__(GOODNESS_THREADS, LANES == 32 ? 3 : 2)
    pair_forward(Pair p, PairPlan plan, const T* h1, const T* h2, const float* target, float margin, float scale,
                 float* loss, float* coefficients, T* d1, T* d2) {
  using P = Pack<T, N>;
  const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
  const bool cluster = LANES > 32 && plan.cluster > 1;
  const unsigned rank = cluster ? cluster_rank() : 0;
  const int64_t row =
      LANES > 32 ? blockIdx.x / plan.cluster : blockIdx.x * static_cast<int64_t>(GOODNESS_THREADS / LANES) + slot;
  if (row >= p.rows) return;  // whole warps, or none
  const int packs = p.dim / N;
  const int begin = least(packs, static_cast<int>(rank) * plan.share), end = least(packs, begin + plan.share);
  const int kept = least(end - begin, plan.kept);
  auto* kept_1 = reinterpret_cast<P*>(shared_memory() + PAIR_PART_BYTES) + static_cast<int64_t>(slot) * 2 * plan.kept;
  auto* kept_2 = kept_1 + plan.kept;
  h1 += row * p.stride_1 + static_cast<int64_t>(begin) * N;
  h2 += row * p.stride_2 + static_cast<int64_t>(begin) * N;

  const int batch = ceil_div(kept, BATCHES * LANES) * LANES;  // packs
#pragma unroll 1
  for (int b = 0; b < BATCHES; ++b) {
    for (int i = b * batch + lane; i < least(kept, (b + 1) * batch); i += LANES) {
      keep(kept_1 + i, h1 + static_cast<int64_t>(i) * N);
      keep(kept_2 + i, h2 + static_cast<int64_t>(i) * N);
    }
    copies_commit();
  }
  const float sign = target[row];  // before the barriers: it takes as long as the copies
  if (cluster) cluster_started();

  float sums[3] = {0.f, 0.f, 0.f};
  auto add = [&](const P& p1, const P& p2) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float a1 = activation(to_float(p1.x[j]), p.relu), a2 = activation(to_float(p2.x[j]), p.relu);
      sums[0] = fmaf(a1, a2, sums[0]);
      sums[1] = fmaf(a1, a1, sums[1]);
      sums[2] = fmaf(a2, a2, sums[2]);
    }
  };
#pragma unroll 4
  for (int i = kept + lane; i < end - begin; i += LANES)
    add(P::load(h1 + static_cast<int64_t>(i) * N), P::load(h2 + static_cast<int64_t>(i) * N));
#pragma unroll 1  // the code is long enough
  for (int b = 0; b < BATCHES; ++b) {
    wait_for_batch(b);
#pragma unroll 2
    for (int i = b * batch + lane; i < least(kept, (b + 1) * batch); i += LANES)
      add(P::load(reinterpret_cast<const T*>(kept_1 + i)), P::load(reinterpret_cast<const T*>(kept_2 + i)));
  }
  add_up<LANES>(sums, reinterpret_cast<float*>(shared_memory()), plan.cluster, rank);

  const float m1 = sums[1] + static_cast<float>(PAIR_COSINE_EPS), m2 = sums[2] + static_cast<float>(PAIR_COSINE_EPS);
  const float product = sqrtf(m1) * sqrtf(m2), cosine = sums[0] / product;
  const float over = cosine - margin;
  const bool positive = sign == 1.f, negative = sign == -1.f;
  const float w = positive ? -1.f : negative && !(cosine <= margin) ? 1.f : 0.f;
  const float c[3] = {w / product, w * cosine / m1, w * cosine / m2};
  if (lane == 0 && rank == 0) {
    loss[row] = positive ? 1.f - cosine : negative ? (over < 0.f ? 0.f : over) : 0.f;
#pragma unroll
    for (int i = 0; i < 3; ++i) coefficients[3 * row + i] = c[i];
  }
  if (!d1 && !d2) return;
  const float scaled[3] = {scale * c[0], scale * c[1], scale * c[2]};
  const int64_t at = row * p.dim + static_cast<int64_t>(begin) * N;
  auto write = [&](const P& p1, const P& p2, int i) {
    const int64_t to = at + static_cast<int64_t>(i) * N;
    write_gradients<T, N>(p1, p2, scaled, p.relu, d1 ? d1 + to : nullptr, d2 ? d2 + to : nullptr);
  };
#pragma unroll 2
  for (int i = lane; i < kept; i += LANES)
    write(P::load(reinterpret_cast<const T*>(kept_1 + i)), P::load(reinterpret_cast<const T*>(kept_2 + i)), i);
  for (int i = kept + lane; i < end - begin; i += LANES)
    write(P::load(h1 + static_cast<int64_t>(i) * N), P::load(h2 + static_cast<int64_t>(i) * N), i);
}

constexpr int AHEAD = 2;  // packs of each tensor that a thread of pair_backward has under way

// How it works: a row is a warp's or that of `parts` blocks, every pack by itself.
// Bound by memory: two reads, up to two writes.
template <class T, int N>
__global__ void __launch_bounds__(GOODNESS_THREADS)
    pair_backward(Pair p, int lanes, int parts, const T* h1, const T* h2, const float* coefficients, const float* grad,
                  T* d1, T* d2) {
  const int64_t row = blockIdx.x / parts * static_cast<int64_t>(GOODNESS_THREADS / lanes) + threadIdx.x / lanes;
  if (row >= p.rows) return;
  float c[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) c[i] = grad[row] * coefficients[3 * row + i];
  h1 += row * p.stride_1;
  h2 += row * p.stride_2;
  const int packs = p.dim / N, step = lanes * parts;
  for (int i = threadIdx.x % lanes + blockIdx.x % parts * lanes; i < packs; i += AHEAD * step) {
    Pack<T, N> p1[AHEAD], p2[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t from = static_cast<int64_t>(i + k * step) * N;
      if (i + k * step < packs) p1[k] = Pack<T, N>::load(h1 + from), p2[k] = Pack<T, N>::load(h2 + from);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t to = row * p.dim + static_cast<int64_t>(i + k * step) * N;
      if (i + k * step < packs)
        write_gradients<T, N>(p1[k], p2[k], c, p.relu, d1 ? d1 + to : nullptr, d2 ? d2 + to : nullptr);
    }
  }
}

// How it works: every thread reads the factor, and leaves where it is 1: the gradients were right already. There are
// only as many blocks as fill the chip, so that leaving takes no longer than a launch. Bound by memory, or nothing at
// all.
template <class T, int N>
__global__ void __launch_bounds__(GOODNESS_THREADS) scale_kernel(T* x, int64_t packs, const float* factor) {
  const float by = *factor;
  if (by == 1.f) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * GOODNESS_THREADS;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(GOODNESS_THREADS) + threadIdx.x; i < packs; i += threads) {
    auto p = Pack<T, N>::load(x + i * N);
#pragma unroll
    for (int j = 0; j < N; ++j) assign(p.x[j], to_float(p.x[j]) * by);
    p.store(x + i * N);
  }
}

bool sensible(const PairRows& g) { return g.rows >= 0 && g.dim > 0 && g.dim <= INT_MAX / 2; }

bool wide(const PairRows& g, int n, const void* d1, const void* d2) {
  return g.dim % n == 0 && g.stride_1 % n == 0 && g.stride_2 % n == 0 && aligned(g.h1) && aligned(g.h2) &&
         aligned(d1) && aligned(d2);
}

Pair shape(const PairRows& g) { return {g.rows, g.stride_1, g.stride_2, static_cast<int>(g.dim), g.relu}; }

template <class T, int N>
int forward(const PairRows& g, Chip chip, const float* target, float margin, float scale, float* loss,
            float* coefficients, void* d1, void* d2) {
  if (chip.capability >= 90 && compiled_for(pair_forward<T, N, GOODNESS_THREADS>) < 90) chip.capability = 80;
  const PairPlan plan = plan_pair(g.rows, static_cast<int>(g.dim) / N, sizeof(T) * N, d1 || d2, chip);
  const auto kernel = plan.lanes == 32 ? pair_forward<T, N, 32> : pair_forward<T, N, GOODNESS_THREADS>;
  return launch(kernel, plan.grid, g.stream, shape(g), plan, static_cast<const T*>(g.h1), static_cast<const T*>(g.h2),
                target, margin, scale, loss, coefficients, static_cast<T*>(d1), static_cast<T*>(d2));
}

template <class T, int N>
int backward(const PairRows& g, Chip chip, const float* coefficients, const float* grad, void* d1, void* d2) {
  const int packs = static_cast<int>(g.dim) / N, lanes = packs <= 256 ? 32 : GOODNESS_THREADS;
  const int parts = lanes == 32 ? 1 : row_parts(g.rows, packs, AHEAD, chip.processors);
  Grid grid = row_grid(g.rows, lanes);
  grid.blocks *= parts;
  return launch(pair_backward<T, N>, grid, g.stream, shape(g), lanes, parts, static_cast<const T*>(g.h1),
                static_cast<const T*>(g.h2), coefficients, grad, static_cast<T*>(d1), static_cast<T*>(d2));
}

}  // namespace

int pair_cosine_forward_cuda(const PairRows& g, const float* target, float margin, float scale, float* loss,
                             float* coefficients, void* d1, void* d2) {
  if (!sensible(g)) return bad_argument;
  OnDevice guard(g.device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    if (wide(g, N, d1, d2)) return forward<T, N>(g, chip, target, margin, scale, loss, coefficients, d1, d2);
    return forward<T, 1>(g, chip, target, margin, scale, loss, coefficients, d1, d2);
  });
}

int pair_cosine_backward_cuda(const PairRows& g, const float* coefficients, const float* grad, void* d1, void* d2) {
  if (!sensible(g)) return bad_argument;
  if (!d1 && !d2) return ok;
  OnDevice guard(g.device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    if (wide(g, N, d1, d2)) return backward<T, N>(g, chip, coefficients, grad, d1, d2);
    return backward<T, 1>(g, chip, coefficients, grad, d1, d2);
  });
}

int scale_cuda(void* x, int64_t size, DType dtype, const float* factor, int device, void* stream) {
  if (size < 0) return bad_argument;
  OnDevice guard(device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    const bool packed = size % N == 0 && aligned(x);
    const int64_t packs = packed ? size / N : size;
    const int64_t blocks = least<int64_t>(ceil_div<int64_t>(packs, GOODNESS_THREADS), 8 * chip.processors);
    const Grid grid{blocks, GOODNESS_THREADS, 0, 1};
    return launch(packed ? scale_kernel<T, N> : scale_kernel<T, 1>, grid, stream, static_cast<T*>(x), packs, factor);
  });
}

}  // namespace ffcl
