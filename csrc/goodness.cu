// Goodness kernels for CUDA: rows of one tensor, and rows of many tensors in one launch. See goodness_rows.cuh.
#include "goodness_cuda.h"
#include "goodness_rows.cuh"

namespace ffcl {
namespace {

// Rows beyond the last exist only where a row is a warp's: whole warps leave.
template <template <class, int, int> class Kernel, class T, int N, int LANES, class... Pointers>
__global__ void __launch_bounds__(GOODNESS_THREADS, 2) over_rows(Shape s, const T* h, Pointers... pointers) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(GOODNESS_THREADS / LANES) + threadIdx.x / LANES;
  if (row < s.rows) Kernel<T, N, LANES>::run(s, h, row, pointers...);
}

template <template <class, int, int> class Kernel, class T, int N, class... Pointers>
int choose_lanes(const Shape& s, void* stream, const T* h, Pointers... pointers) {
  const int lanes = s.dim / N <= 32 * Kernel<T, N, 32>::KEEP ? 32 : GOODNESS_THREADS;
  void (*kernel)(Shape, const T*, Pointers...) = over_rows<Kernel, T, N, GOODNESS_THREADS, Pointers...>;
  if (lanes == 32) kernel = over_rows<Kernel, T, N, 32, Pointers...>;
  return launch(kernel, row_grid(s.rows, lanes), stream, s, h, pointers...);
}

// `dense`: the other (rows, dim) tensors, null where there is none.
template <template <class, int, int> class Kernel, class T, class... Pointers>
int choose_pack(const GoodnessRows& g, const void* dense_1, const void* dense_2, Pointers... pointers) {
  constexpr int N = 16 / sizeof(T);
  const Shape s{g.rows, g.stride, static_cast<int>(g.dim), g.relu, g.mean, g.eps};
  const T* h = static_cast<const T*>(g.h);
  const bool wide = g.dim % N == 0 && g.stride % N == 0 && aligned(h) && aligned(dense_1) && aligned(dense_2);
  if (wide) return choose_lanes<Kernel, T, N>(s, g.stream, h, pointers...);
  return choose_lanes<Kernel, T, 1>(s, g.stream, h, pointers...);
}

bool sensible(const GoodnessRows& g) { return g.rows >= 0 && g.dim > 0 && g.dim <= INT_MAX - GOODNESS_THREADS; }

// How it works: a block finds its layer among the launch's arguments, and its rows in the layer.
// Bound by memory, or by the latency of one launch where the layers are small.
template <class T, int N, bool BACKWARD>
__global__ void __launch_bounds__(GOODNESS_THREADS)
    many_rows(__grid_constant__ const ManyLayers all, bool relu, bool mean, float* goodness, const float* grad) {
  const ManyLayer& l = all.layer[layer_of(all, blockIdx.x)];
  const Shape s{l.rows, l.stride, l.dim, relu, mean, 0.f};
  const int64_t block = blockIdx.x - l.first_block;
  const int64_t row = l.lanes == 32 ? block * (GOODNESS_THREADS / 32) + threadIdx.x / 32 : block;
  if (row >= l.rows) return;
  const T* h = static_cast<const T*>(l.h);
  if constexpr (BACKWARD) {
    T* dh = static_cast<T*>(l.dh);
    if (l.lanes == 32)
      Backward<T, N, 32>::run(s, h, row, nullptr, grad + l.first_row, nullptr, dh);
    else
      Backward<T, N, GOODNESS_THREADS>::run(s, h, row, nullptr, grad + l.first_row, nullptr, dh);
  } else {
    if (l.lanes == 32)
      Forward<T, N, 32>::run(s, h, row, goodness + l.first_row, nullptr);
    else
      Forward<T, N, GOODNESS_THREADS>::run(s, h, row, goodness + l.first_row, nullptr);
  }
}

template <class T, bool BACKWARD>
int many(const GoodnessMany& g, float* goodness, const float* grad) {
  constexpr int N = 16 / sizeof(T);
  constexpr int KEEP = BACKWARD ? Backward<T, N, 32>::KEEP : Forward<T, N, 32>::KEEP;
  ManyLayers all = g.layers;
  bool wide = true;
  for (int i = 0; i < all.count; ++i) {
    const ManyLayer& l = all.layer[i];
    if (l.rows < 0 || l.dim <= 0 || l.dim > INT_MAX - GOODNESS_THREADS) return bad_argument;
    wide = wide && l.dim % N == 0 && l.stride % N == 0 && aligned(l.h) && (!BACKWARD || aligned(l.dh));
  }
  const Grid grid{plan_many(all, wide ? N : 1, KEEP), GOODNESS_THREADS, PART_BYTES, 1};
  const auto kernel = wide ? many_rows<T, N, BACKWARD> : many_rows<T, 1, BACKWARD>;
  return launch(kernel, grid, g.stream, all, g.relu, g.mean, goodness, grad);
}

}  // namespace

int goodness_forward_cuda(const GoodnessRows& g, float* goodness, void* out) {
  if (!sensible(g)) return bad_argument;
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    return choose_pack<Forward, T>(g, out, nullptr, goodness, static_cast<T*>(out));
  });
}

int goodness_backward_cuda(const GoodnessRows& g, const float* goodness, const float* grad_goodness,
                           const void* grad_out, void* dh) {
  if (!sensible(g)) return bad_argument;
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    return choose_pack<Backward, T>(g, grad_out, dh, goodness, grad_goodness, static_cast<const T*>(grad_out),
                                    static_cast<T*>(dh));
  });
}

int goodness_many_cuda(const GoodnessMany& g, float* goodness) {
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) { return many<decltype(type), false>(g, goodness, nullptr); });
}

int goodness_many_backward_cuda(const GoodnessMany& g, const float* grad_goodness) {
  const OnDevice guard(g.device);
  if (guard.error != cudaSuccess) return status_of(guard.error);
  return with_type(g.dtype, [&](auto type) { return many<decltype(type), true>(g, nullptr, grad_goodness); });
}

const char* cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - cuda_error_base)); }

}  // namespace ffcl
