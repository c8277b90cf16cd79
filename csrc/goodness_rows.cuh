// The goodness of one row and its gradient, by a warp or by a block where a warp's registers cannot hold the row.
//
// Every thread keeps up to KEEP packs (16 bytes where the rows are aligned, else one element) of its row in registers
// between the reduction and the write, so that a row of up to LANES * KEEP packs is read once (32 KB by a block, half
// as much of each input in backward). The rest of a longer row is read again: from L2 while all rows in flight fit in
// it, else from memory. Bound by memory: forward reads h and writes out, backward reads h and grad_out and writes dh.
// Sums are float32 in a fixed order, so results repeat bit for bit.
#pragma once

#include "cuda_launch.cuh"

namespace ffcl {
namespace {

// A float a warp: the start of the block's shared memory.
__device__ inline float* warp_parts() { return reinterpret_cast<float*>(shared_memory()); }

struct Shape {
  int64_t rows, stride;
  int dim;
  bool relu, mean;
  float eps;
};

template <class T, int N, int LANES>
struct Forward {
  static constexpr int KEEP = 8;

  __device__ static void run(const Shape& s, const T* h, int64_t row, float* goodness, T* out) {
    using P = Pack<T, N>;
    const int lane = threadIdx.x % LANES, packs = s.dim / N;
    h += row * s.stride;
    P kept[KEEP];
    float sum = 0.f;
    auto add = [&](const P& p) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float a = activation(to_float(p.x[j]), s.relu);
        sum = fmaf(a, a, sum);
      }
    };
#pragma unroll
    for (int i = 0; i < KEEP; ++i)
      if (lane + i * LANES < packs) kept[i] = P::load(h + static_cast<int64_t>(lane + i * LANES) * N);
#pragma unroll
    for (int i = 0; i < KEEP; ++i)
      if (lane + i * LANES < packs) add(kept[i]);
    for (int64_t i = lane + KEEP * LANES; i < packs; i += LANES) add(P::load(h + i * N));
    sum = row_sum<LANES, GOODNESS_THREADS>(sum, warp_parts());
    const float mean = sum / s.dim;
    if (lane == 0) goodness[row] = s.mean ? mean : sum;
    if (!out) return;

    out += row * s.dim;
    const float divisor = sqrtf(mean) + s.eps;
    const float factor = divisor == 0.f ? 0.f : 1.f / divisor;
    auto write = [&](P p, int64_t i) {
#pragma unroll
      for (int j = 0; j < N; ++j) assign(p.x[j], activation(to_float(p.x[j]), s.relu) * factor);
      p.store(out + i * N);
    };
#pragma unroll
    for (int i = 0; i < KEEP; ++i)
      if (lane + i * LANES < packs) write(kept[i], lane + i * LANES);
    for (int64_t i = lane + KEEP * LANES; i < packs; i += LANES) write(P::load(h + i * N), i);
  }
};

template <class T, int N, int LANES>
struct Backward {
  static constexpr int KEEP = 4;  // of h and as many of grad_out

  __device__ static void run(const Shape& s, const T* h, int64_t row, const float* goodness, const float* grad_goodness,
                             const T* grad_out, T* dh) {
    using P = Pack<T, N>;
    const int lane = threadIdx.x % LANES, packs = s.dim / N;
    h += row * s.stride;
    dh += row * s.dim;
    if (grad_out) grad_out += row * s.dim;
    P kept[KEEP], kept_grad[KEEP];
#pragma unroll
    for (int i = 0; i < KEEP; ++i) {
      const int64_t at = static_cast<int64_t>(lane + i * LANES) * N;
      if (lane + i * LANES >= packs) continue;
      kept[i] = P::load(h + at);
      if (grad_out) kept_grad[i] = P::load(grad_out + at);
    }

    // dh = own * a + through * grad_out, where a > 0 or there is no ReLU
    float own = grad_goodness ? grad_goodness[row] * (s.mean ? 2.f / s.dim : 2.f) : 0.f;
    float through = 0.f;
    if (grad_out) {
      float along = 0.f;  // <a, grad_out>
      auto add = [&](const P& p, const P& g) {
#pragma unroll
        for (int j = 0; j < N; ++j) along = fmaf(activation(to_float(p.x[j]), s.relu), to_float(g.x[j]), along);
      };
#pragma unroll
      for (int i = 0; i < KEEP; ++i)
        if (lane + i * LANES < packs) add(kept[i], kept_grad[i]);
      for (int64_t i = lane + KEEP * LANES; i < packs; i += LANES) add(P::load(h + i * N), P::load(grad_out + i * N));
      along = row_sum<LANES, GOODNESS_THREADS>(along, warp_parts());
      const float rms = sqrtf(s.mean ? goodness[row] : goodness[row] / s.dim);
      through = 1.f / (rms + s.eps);
      if (rms != 0.f) own -= along * through * through / (s.dim * rms);
    }

    auto write = [&](const P& p, const P& g, int64_t i) {
      P d;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = to_float(p.x[j]);
        float grad = own * x;
        if (grad_out) grad = fmaf(through, to_float(g.x[j]), grad);
        assign(d.x[j], s.relu && x <= 0.f ? 0.f : grad);
      }
      d.store(dh + i * N);
    };
#pragma unroll
    for (int i = 0; i < KEEP; ++i)
      if (lane + i * LANES < packs) write(kept[i], kept_grad[i], lane + i * LANES);
    for (int64_t i = lane + KEEP * LANES; i < packs; i += LANES) {
      const P p = P::load(h + i * N);
      write(p, grad_out ? P::load(grad_out + i * N) : p, i);
    }
  }
};

}  // namespace
}  // namespace ffcl
