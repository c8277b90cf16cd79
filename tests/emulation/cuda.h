// What csrc/similarity_sm90.cu uses of the driver, for the emulator: descriptions of tensors for TMA.
#pragma once

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };

struct CUtensorMap {
  const unsigned char* base;
  uint64_t sizes[2], stride;
  uint32_t box[2];
};

// The manual's conditions for a matrix of 16-bit elements in the 128-byte swizzle.
inline CUresult emulated_encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool good = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && sizes[0] && sizes[1] &&
                    sizes[0] <= uint64_t{1} << 32 && sizes[1] <= uint64_t{1} << 32 && strides[0] % 16 == 0 &&
                    strides[0] < uint64_t{1} << 40 && strides[0] >= sizes[0] * 2 && box[0] * 2 <= 128 &&
                    box[0] * 2 % 16 == 0 && box[1] && box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(base), {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}};
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** address, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *address = known ? reinterpret_cast<void*>(&emulated_encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
