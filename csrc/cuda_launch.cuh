// What every CUDA kernel file shares: element types, 16-byte packs, and launches whose status is always checked.
//
// csrc/*.cu are also compiled as plain C++ against tests/emulation/, where the kernels run on the CPU. So they start
// through launch() rather than <<<>>>, and take all their shared memory from shared_memory().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstring>

#include "cuda_plan.h"
#include "isa.h"
#include "ptx.cuh"

namespace ffcl {
namespace {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N neighbouring elements: one 16-byte access, or a single element.
template <class T, int N>
struct Pack {
  T x[N];

  __device__ static Pack load(const T* from) {
    Pack p;
    if constexpr (sizeof(p.x) == 16) {
      const uint4 bits = load16(from);
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
      store16(to, bits);
    } else {
      to[0] = x[0];
    }
  }
};

// To global memory that the kernel does not read (see store16_global).
template <class T, int N>
__device__ void store_global(const Pack<T, N>& p, T* to) {
  if constexpr (sizeof(p.x) == 16) {
    uint4 bits;
    memcpy(&bits, &p.x, 16);
    store16_global(to, bits);
  } else {
    p.store(to);
  }
}

// NaN is not below zero, so it passes.
__device__ inline float activation(float h, bool relu) { return relu && h < 0.f ? 0.f : h; }

__device__ inline float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sum over the LANES threads of a row (a warp, or all of the block), in all of them and in one order. Every thread of a
// block calls it; part: THREADS / 32 floats of shared memory that nothing else uses.
template <int LANES, int THREADS>
__device__ inline float row_sum(float x, float* part) {
  x = warp_sum(x);
  if constexpr (LANES == THREADS) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
    for (int i = 0; i < THREADS / 32; ++i) x += part[i];
  }
  return x;
}

inline int status_of(cudaError_t error) { return error == cudaSuccess ? ok : cuda_error_base + error; }

// Starts a kernel with `grid`; a Status.
template <class... Expected, class... Given>
int launch(void (*kernel)(Expected...), const Grid& grid, void* stream, Given... given) {
  if (grid.blocks == 0) return ok;
  if (grid.blocks > INT_MAX) return bad_argument;
  if (grid.shared > (48 << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(given)...);
  const cudaError_t sticky = cudaGetLastError();
  return status_of(error != cudaSuccess ? error : sticky);
}

// The capability whose instructions a kernel's code on this device may use: less than the device's where the driver has
// compiled it from an older one's PTX. 0 where it cannot be had.
template <class... Arguments>
int compiled_for(void (*kernel)(Arguments...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
}

// The device this thread launches on, put back at the end: this library has its own copy of the CUDA runtime.
struct OnDevice {
  int before = 0, device;
  cudaError_t error;

  explicit OnDevice(int device) : device(device), error(cudaGetDevice(&before)) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess) cudaSetDevice(before);
  }
  // What the plans depend on; `error` where it cannot be had.
  Chip chip() {
    Chip chip;
    int major = 0, minor = 0;
    query(cudaDevAttrComputeCapabilityMajor, major);
    query(cudaDevAttrComputeCapabilityMinor, minor);
    query(cudaDevAttrMultiProcessorCount, chip.processors);
    query(cudaDevAttrMaxSharedMemoryPerBlockOptin, chip.shared);
    chip.capability = major * 10 + minor;
    return chip;
  }

 private:
  void query(cudaDeviceAttr attribute, int& value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  }
};

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Calls use(T()) with the element type of dtype.
template <class Use>
int with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::float32: return use(float());
    case DType::bfloat16: return use(__nv_bfloat16());
    case DType::float16: return use(__half());
  }
  return bad_argument;
}

}  // namespace
}  // namespace ffcl
