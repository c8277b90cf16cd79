// Goodness kernels for CUDA: one row a warp, or a block where a warp's registers cannot hold it.
//
// Every thread keeps up to KEEP packs (16 bytes where the rows are aligned, else one element) of its row in registers
// between the reduction and the write, so that a row of up to LANES * KEEP packs is read once; the rest of a longer row
// is read again, from L2. Bound by memory: forward reads h and writes out, backward reads h and grad_out and writes dh.
// Sums are float32 in a fixed order, so results repeat bit for bit.
#include "goodness_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstring>

namespace ffcl {
namespace {

constexpr int THREADS = 256;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N neighbouring elements: one 16-byte access, or a single element.
template <class T, int N>
struct Pack {
  T x[N];

  __device__ static Pack load(const T* from) {
    Pack p;
    if constexpr (sizeof(p.x) == 16) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      memcpy(&p.x, &bits, 16);
    } else {
      p.x[0] = from[0];
    }
    return p;
  }
  __device__ void store(T* to) const {
    if constexpr (sizeof(x) == 16) {
      uint4 bits;
      memcpy(&bits, &x, 16);
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
      to[0] = x[0];
    }
  }
};

// NaN is not below zero, so it passes.
__device__ float activation(float h, bool relu) { return relu && h < 0.f ? 0.f : h; }

// Sum over the LANES threads of a row, in all of them. Every thread of the block calls it.
template <int LANES>
__device__ float row_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if constexpr (LANES == THREADS) {
    __shared__ float part[THREADS / 32];
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
    for (int i = 0; i < THREADS / 32; ++i) x += part[i];
  }
  return x;
}

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
    sum = row_sum<LANES>(sum);
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
      along = row_sum<LANES>(along);
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

// Rows beyond the last exist only where LANES < THREADS: whole warps leave.
template <template <class, int, int> class Kernel, class T, int N, int LANES, class... Pointers>
__global__ void __launch_bounds__(THREADS) over_rows(Shape s, const T* h, Pointers... pointers) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(THREADS / LANES) + threadIdx.x / LANES;
  if (row < s.rows) Kernel<T, N, LANES>::run(s, h, row, pointers...);
}

template <template <class, int, int> class Kernel, class T, int N, int LANES, class... Pointers>
int launch(const Shape& s, void* stream, const void* h, Pointers... pointers) {
  const int64_t blocks = (s.rows + THREADS / LANES - 1) / (THREADS / LANES);
  if (blocks > INT_MAX) return bad_argument;
  over_rows<Kernel, T, N, LANES><<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      s, static_cast<const T*>(h), pointers...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ok : cuda_error_base + error;
}

template <template <class, int, int> class Kernel, class T, int N, class... Pointers>
int choose_lanes(const Shape& s, void* stream, const void* h, Pointers... pointers) {
  if (s.dim / N <= 32 * Kernel<T, N, 32>::KEEP) return launch<Kernel, T, N, 32>(s, stream, h, pointers...);
  return launch<Kernel, T, N, THREADS>(s, stream, h, pointers...);
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// `dense`: the other (rows, dim) tensors, null where there is none.
template <template <class, int, int> class Kernel, class T, class... Pointers>
int choose_pack(const GoodnessRows& g, const void* dense_1, const void* dense_2, Pointers... pointers) {
  constexpr int N = 16 / sizeof(T);
  const Shape s{g.rows, g.stride, static_cast<int>(g.dim), g.relu, g.mean, g.eps};
  const bool wide = g.dim % N == 0 && g.stride % N == 0 && aligned(g.h) && aligned(dense_1) && aligned(dense_2);
  if (wide) return choose_lanes<Kernel, T, N>(s, g.stream, g.h, pointers...);
  return choose_lanes<Kernel, T, 1>(s, g.stream, g.h, pointers...);
}

// The device this thread launches on, put back at the end: this library has its own copy of the CUDA runtime.
struct OnDevice {
  int before = 0;
  cudaError_t error;

  explicit OnDevice(int device) : error(cudaGetDevice(&before)) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess) cudaSetDevice(before);
  }
};

bool sensible(const GoodnessRows& g) { return g.rows >= 0 && g.dim > 0 && g.dim <= INT_MAX - THREADS; }

template <class T>
int forward(const GoodnessRows& g, float* goodness, void* out) {
  return choose_pack<Forward, T>(g, out, nullptr, goodness, static_cast<T*>(out));
}

template <class T>
int backward(const GoodnessRows& g, const float* goodness, const float* grad_goodness, const void* grad_out, void* dh) {
  return choose_pack<Backward, T>(g, grad_out, dh, goodness, grad_goodness, static_cast<const T*>(grad_out),
                                  static_cast<T*>(dh));
}

}  // namespace

int goodness_forward_cuda(const GoodnessRows& g, float* goodness, void* out) {
  if (!sensible(g)) return bad_argument;
  if (g.rows == 0) return ok;
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return cuda_error_base + guard.error;
  switch (g.dtype) {
    case DType::float32: return forward<float>(g, goodness, out);
    case DType::bfloat16: return forward<__nv_bfloat16>(g, goodness, out);
    case DType::float16: return forward<__half>(g, goodness, out);
  }
  return bad_argument;
}

int goodness_backward_cuda(const GoodnessRows& g, const float* goodness, const float* grad_goodness,
                           const void* grad_out, void* dh) {
  if (!sensible(g)) return bad_argument;
  if (g.rows == 0) return ok;
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return cuda_error_base + guard.error;
  switch (g.dtype) {
    case DType::float32: return backward<float>(g, goodness, grad_goodness, grad_out, dh);
    case DType::bfloat16: return backward<__nv_bfloat16>(g, goodness, grad_goodness, grad_out, dh);
    case DType::float16: return backward<__half>(g, goodness, grad_goodness, grad_out, dh);
  }
  return bad_argument;
}

const char* cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - cuda_error_base)); }

}  // namespace ffcl
