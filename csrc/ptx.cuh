// The instructions that C++ has no name for, one function each; tests/emulation/ has the same functions for a CPU.
#pragma once

#ifdef FFCL_EMULATED
#include "emulated_ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef FFCL_SM90A
#include <cuda.h>
#endif

#include <cstdint>

namespace ffcl {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, at a multiple of 1024 bytes (what TMA's and wgmma's 128-byte swizzle asks for).
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char ffcl_shared[];
  return ffcl_shared;
}
__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ void store16(void* to, uint4 bits) { *static_cast<uint4*>(to) = bits; }
// The same to global memory that the kernel does not read: always one instruction, where nvcc at times makes four.
__device__ __forceinline__ void store16_global(void* to, uint4 bits) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, in the background; zeros where not `valid`, and then nothing is read.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups of copies are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------------

// 2^x to 2 units in the last place; subnormal results are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a warp: a is 16 x 16, b is 16 x 8, d is 16 x 8 in float32.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters of blocks. Before sm_90 a cluster is one block.
// ---------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// All threads of the cluster meet; what they wrote before is seen after.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// All blocks of the cluster are there, so that their shared memory may be written. Releases nothing, waits for no
// copies.
__device__ __forceinline__ void cluster_started() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// The address, in block `rank` of the cluster, of what is at `p` in this block's shared memory.
template <class T>
__device__ __forceinline__ T* in_block(T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
#else
  return p;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a: barriers that count bytes, bulk copies of tiles, products by a warpgroup from shared memory
// ---------------------------------------------------------------------------------------------------------------------

// `threads` threads of the block meet at barrier `id` (not 0, which is __syncthreads).
__device__ __forceinline__ void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#ifdef FFCL_SM90A

__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// The barriers of this thread are there for the other blocks and for the copy engine.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and adds bytes to what the phase waits for.
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(uint64_t* b, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
// Whether that phase has ended.
__device__ __forceinline__ bool barrier_passed(uint64_t* b, int parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(passed)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return passed;
}
// A box of the tensor at (x, y) to the same place of every block in `blocks` (a bit each), whose barriers count it.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* b, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void copy_box_to(unsigned blocks, void* to, const CUtensorMap* map, uint64_t* b, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Nothing that reads x is moved before this, hence not before the wait for the product that makes it.
__device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// d = a b^T, or d + a b^T where `add`, for the four warps of a group: a is 64 x 16 and b 128 x 16 in shared memory.
#define FFCL_WGMMA(TYPE)                                                                                            \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, "  \
      "%65, p, 1, 1, 0, 0;\n}"                                                                                      \
      : FFCL_4(d[0]), FFCL_4(d[1]), FFCL_4(d[2]), FFCL_4(d[3]), FFCL_4(d[4]), FFCL_4(d[5]), FFCL_4(d[6]),           \
        FFCL_4(d[7]), FFCL_4(d[8]), FFCL_4(d[9]), FFCL_4(d[10]), FFCL_4(d[11]), FFCL_4(d[12]), FFCL_4(d[13]),       \
        FFCL_4(d[14]), FFCL_4(d[15])                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define FFCL_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

__device__ __forceinline__ void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b, bool add, __nv_bfloat16) {
  FFCL_WGMMA("bf16");
}
__device__ __forceinline__ void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b, bool add, __half) {
  FFCL_WGMMA("f16");
}
#undef FFCL_4
#undef FFCL_WGMMA

#endif  // FFCL_SM90A

}  // namespace
}  // namespace ffcl

#endif
