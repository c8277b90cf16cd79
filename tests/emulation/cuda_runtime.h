// What csrc/*.cu use of the CUDA runtime, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define FFCL_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
static const emulated::Index &blockDim = emulated::block_size, &gridDim = emulated::grid;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The device that is emulated: tests set it (see module.cpp).
namespace emulated {
struct Device {
  int major = 9, minor = 0, processors = 2, shared = 227 << 10, compiled_for = 90;
};
extern Device device;
extern size_t largest_shared;  // that a kernel was allowed by cudaFuncSetAttribute
extern long launches;
extern long good_launches;  // that are still to succeed before one fails; -1 where none is to fail
extern unsigned largest_cluster;
}  // namespace emulated

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "invalid argument"
         : error == cudaErrorLaunchOutOfResources ? "too many resources requested for launch"
                                                  : "emulated CUDA error";
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = emulated::device.compiled_for;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  emulated::largest_shared = bytes;
  return bytes <= emulated::device.shared ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulated::device.processors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulated::device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulated::device.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulated::device.shared; break;
  }
  return cudaSuccess;
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  emulated::Launch launch;
  launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  launch.shared = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) launch.cluster = config->attrs[i].val.clusterDim.x;
  if (launch.cluster > emulated::largest_cluster) emulated::largest_cluster = launch.cluster;
  const bool bad = !launch.grid.x || launch.block.x > 1024 || launch.shared > size_t(emulated::device.shared) ||
                   (launch.shared > (48 << 10) && launch.shared > emulated::largest_shared) ||
                   (launch.cluster > 1 && emulated::device.major < 9);
  emulated::largest_shared = 0;
  ++emulated::launches;
  if (bad) return cudaErrorInvalidValue;
  if (emulated::good_launches >= 0 && emulated::good_launches-- == 0) return cudaErrorLaunchOutOfResources;
  emulated::run(launch, [&] { kernel(static_cast<Expected>(given)...); });
  return cudaSuccess;
}

inline void __syncthreads() {
  const emulated::races::Quiet quiet;
  emulated::self->block->barriers[0].arrive_and_wait(blockDim.x * blockDim.y * blockDim.z, true);
}
// Whether one thread of the block has an `x` that is not 0.
inline int __syncthreads_or(int x) {
  const emulated::races::Quiet quiet;
  auto& any = emulated::self->block->any;
  any |= x != 0;
  __syncthreads();
  const bool result = any;
  __syncthreads();
  any = false;
  __syncthreads();
  return result;
}
inline void __syncwarp() {
  const emulated::races::Quiet quiet;
  emulated::self->warp().barrier.arrive_and_wait(emulated::self->lanes(), true);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const emulated::races::Quiet quiet;
  const unsigned from = emulated::self->lane() ^ static_cast<unsigned>(mask);
  return emulated::exchange(x, [&](auto lane) { return lane(from); });
}
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return emulated::exchange(x, [&](auto lane) { return lane(static_cast<unsigned>(from)); });
}
inline bool __any_sync(unsigned, bool x) {
  return emulated::exchange(x, [&](auto lane) {
    bool any = false;
    for (unsigned i = 0; i < emulated::self->lanes(); ++i) any |= lane(i);
    return any;
  });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
// A product that stays one, hence volatile: elsewhere nvcc makes one instruction of a product and a sum, as this build.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
using std::max;
using std::min;
