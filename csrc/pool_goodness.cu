// Global average pooling with its goodness for CUDA; contract in goodness.h.
#include "goodness_cuda.h"
#include "goodness_rows.cuh"

namespace ffcl {
namespace {

struct Map {
  int64_t samples, stride;
  int channels, positions;
  bool relu;
};

template <class T, int N>
__device__ float pack_sum(const Pack<T, N>& p, bool relu) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < N; ++j) sum += activation(to_float(p.x[j]), relu);
  return sum;
}

// How it works: a warp adds a channel's positions. Bound by memory: one read.
template <class T, int N>
__global__ void __launch_bounds__(GOODNESS_THREADS) pool_warp(Map m, PoolPlan plan, const T* h, float* pooled) {
  const int64_t sample = blockIdx.x / plan.parts;
  const int channel = static_cast<int>(blockIdx.x % plan.parts) * (GOODNESS_THREADS / 32) + threadIdx.x / 32;
  if (channel >= m.channels) return;
  h += sample * m.stride + static_cast<int64_t>(channel) * m.positions;
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < m.positions / N; i += 32)
    sum += pack_sum(Pack<T, N>::load(h + static_cast<int64_t>(i) * N), m.relu);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) pooled[sample * m.channels + channel] = sum / m.positions;
}

// How it works: a block copies whole channels to shared memory, 16 bytes a thread and load whatever the number of
// positions, and each thread adds one channel, from a start of its own so that the threads use all banks.
// Bound by memory: one read.
template <class T, int N>
__global__ void __launch_bounds__(STAGED_CHANNELS) pool_staged(Map m, PoolPlan plan, const T* h, float* pooled) {
  const int64_t sample = blockIdx.x / plan.parts;
  const int first = static_cast<int>(blockIdx.x % plan.parts) * STAGED_CHANNELS;
  const int channels = least(STAGED_CHANNELS, m.channels - first), elements = channels * m.positions;
  T* staged = reinterpret_cast<T*>(shared_memory());
  h += sample * m.stride + static_cast<int64_t>(first) * m.positions;
#pragma unroll 4
  for (int i = threadIdx.x; i < elements / N; i += STAGED_CHANNELS)
    Pack<T, N>::load(h + static_cast<int64_t>(i) * N).store(staged + static_cast<int64_t>(i) * N);
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel >= channels) return;
  float sum = 0.f;
  int at = channel % m.positions;
  for (int i = 0; i < m.positions; ++i) {
    sum += activation(to_float(staged[channel * m.positions + at]), m.relu);
    at = at + 1 == m.positions ? 0 : at + 1;
  }
  pooled[sample * m.channels + first + channel] = sum / m.positions;
}

constexpr int AHEAD = 4;  // loads of a thread that are under way; the compiler, which does not know the step, had one

// How it works: threads side by side have neighbouring packs of channels, groups of them every so many positions; the
// groups' sums meet in shared memory. Bound by memory: one read.
template <class T, int N>
__global__ void __launch_bounds__(GOODNESS_THREADS) pool_last(Map m, PoolPlan plan, const T* h, float* pooled) {
  const int64_t sample = blockIdx.x / plan.parts;
  const int first = static_cast<int>(blockIdx.x % plan.parts) * plan.across, packs = m.channels / N;
  const int across = threadIdx.x % plan.across, group = threadIdx.x / plan.across;
  const int groups = GOODNESS_THREADS / plan.across, pack = first + across;
  const bool used = group < groups && pack < packs;
  float sums[N] = {};
  if (used) {
    h += sample * m.stride + static_cast<int64_t>(pack) * N;
    for (int i = group; i < m.positions; i += AHEAD * groups) {
      Pack<T, N> p[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k)
        if (i + k * groups < m.positions)
          p[k] = Pack<T, N>::load(h + static_cast<int64_t>(i + k * groups) * m.channels);
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        if (i + k * groups >= m.positions) break;
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += activation(to_float(p[k].x[j]), m.relu);
      }
    }
  }
  float* shares = reinterpret_cast<float*>(shared_memory());  // (N, groups, across)
  if (used)
    for (int j = 0; j < N; ++j) shares[(j * groups + group) * plan.across + across] = sums[j];
  __syncthreads();
  for (int c = threadIdx.x; c < plan.across * N; c += GOODNESS_THREADS) {
    if (first + c / N >= packs) continue;
    float sum = 0.f;
    for (int g = 0; g < groups; ++g) sum += shares[(c % N * groups + g) * plan.across + c / N];
    pooled[sample * m.channels + static_cast<int64_t>(first) * N + c] = sum / m.positions;
  }
}

// How it works: a warp has a sample. Bound by latency: a few kilobytes a sample.
__global__ void __launch_bounds__(GOODNESS_THREADS)
    pool_finish(int64_t samples, int channels, bool mean, const float* pooled, float* goodness) {
  const int64_t sample = blockIdx.x * static_cast<int64_t>(GOODNESS_THREADS / 32) + threadIdx.x / 32;
  if (sample >= samples) return;
  float sum = 0.f;
  for (int i = threadIdx.x % 32; i < channels; i += 32) {
    const float p = pooled[sample * channels + i];
    sum = fmaf(p, p, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) goodness[sample] = mean ? sum / channels : sum;
}

// How it works: a thread has a pack; its channels' gradients come from the caches.
// Bound by memory: one write, and one read where ReLU needs h.
template <class T, int N>
__global__ void __launch_bounds__(GOODNESS_THREADS)
    pool_backward(Map m, bool channels_last, int parts, float factor, const T* h, const float* pooled,
                  const float* grad_goodness, const float* grad_pooled, T* dh) {
  const int64_t sample = blockIdx.x / parts, size = static_cast<int64_t>(m.channels) * m.positions;
  const int64_t at = (static_cast<int64_t>(blockIdx.x % parts) * GOODNESS_THREADS + threadIdx.x) * N;
  if (at >= size) return;
  const int other = channels_last ? m.channels : m.positions;
  int channel = static_cast<int>(channels_last ? at % other : at / other);
  int position = static_cast<int>(channels_last ? at / other : at % other);
  const float of_sample = grad_goodness ? grad_goodness[sample] * factor : 0.f;
  Pack<T, N> p, d;
  if (m.relu) p = Pack<T, N>::load(h + sample * m.stride + at);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int64_t c = sample * m.channels + channel;
    const float grad = (grad_goodness ? of_sample * pooled[c] : 0.f) + (grad_pooled ? grad_pooled[c] : 0.f);
    assign(d.x[j], m.relu && to_float(p.x[j]) <= 0.f ? 0.f : grad / m.positions);
    if (channels_last) {
      if (++channel == other) channel = 0;
    } else if (++position == other) {
      position = 0;
      ++channel;
    }
  }
  store_global(d, dh + sample * size + at);
}

bool sensible(const PoolMaps& g) {
  return g.samples >= 0 && g.channels > 0 && g.positions > 0 && g.channels <= INT_MAX / 2 && g.positions <= INT_MAX / 2;
}

Map shape(const PoolMaps& g) {
  return {g.samples, g.stride, static_cast<int>(g.channels), static_cast<int>(g.positions), g.relu};
}

template <class T>
int forward(const PoolMaps& g, int processors, float* pooled) {
  constexpr int N = 16 / sizeof(T);
  const Map m = shape(g);
  const bool wide = aligned(g.h) && g.stride % N == 0;
  const PoolPlan plan = plan_pool(g.samples, m.channels, m.positions, g.channels_last, N, wide, processors);
  const T* h = static_cast<const T*>(g.h);
  switch (plan.way) {
    case PoolWay::warp:
      return launch(plan.pack == 1 ? pool_warp<T, 1> : pool_warp<T, N>, plan.grid, g.stream, m, plan, h, pooled);
    case PoolWay::staged: return launch(pool_staged<T, N>, plan.grid, g.stream, m, plan, h, pooled);
    case PoolWay::last:
      return launch(plan.pack == 1 ? pool_last<T, 1> : pool_last<T, N>, plan.grid, g.stream, m, plan, h, pooled);
  }
  return bad_argument;
}

template <class T>
int backward(const PoolMaps& g, const float* pooled, const float* grad_goodness, const float* grad_pooled, void* dh) {
  constexpr int N = 16 / sizeof(T);
  const Map m = shape(g);
  const int64_t size = g.channels * g.positions;
  const bool wide = aligned(g.h) && aligned(dh) && g.stride % N == 0 && size % N == 0;
  const int64_t parts = ceil_div<int64_t>(size, (wide ? N : 1) * GOODNESS_THREADS);
  if (parts > INT_MAX) return bad_argument;
  const float factor = g.mean ? 2.f / g.channels : 2.f;
  const Grid grid{g.samples * parts, GOODNESS_THREADS, 0, 1};
  return launch(wide ? pool_backward<T, N> : pool_backward<T, 1>, grid, g.stream, m, g.channels_last,
                static_cast<int>(parts), factor, static_cast<const T*>(g.h), pooled, grad_goodness, grad_pooled,
                static_cast<T*>(dh));
}

}  // namespace

int pool_goodness_forward_cuda(const PoolMaps& g, float* goodness, float* pooled) {
  if (!sensible(g)) return bad_argument;
  OnDevice guard(g.device);
  const Chip chip = guard.chip();
  if (guard.error != cudaSuccess) return status_of(guard.error);
  const int status = with_type(g.dtype, [&](auto type) { return forward<decltype(type)>(g, chip.processors, pooled); });
  if (status != ok) return status;
  return launch(pool_finish, row_grid(g.samples, 32), g.stream, g.samples, static_cast<int>(g.channels), g.mean, pooled,
                goodness);
}

int pool_goodness_backward_cuda(const PoolMaps& g, const float* pooled, const float* grad_goodness,
                                const float* grad_pooled, void* dh) {
  if (!sensible(g)) return bad_argument;
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype,
                   [&](auto type) { return backward<decltype(type)>(g, pooled, grad_goodness, grad_pooled, dh); });
}

}  // namespace ffcl
