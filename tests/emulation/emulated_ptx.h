// csrc/ptx.cuh for the emulator: what the PTX manual says of each instruction, in C++.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace ffcl {
namespace {

using emulated::self;
namespace races = emulated::races;

FFCL_UNWATCHED inline unsigned char* shared_memory() { return self->block->shared; }
FFCL_INSTRUCTION uint4 load16(const void* from) {
  emulated::require_aligned(from, 16);
  uint4 bits;
  std::memcpy(&bits, from, 16);
  return bits;
}
FFCL_INSTRUCTION void store16(void* to, uint4 bits) {
  emulated::require_aligned(to, 16);
  std::memcpy(to, &bits, 16);
}
FFCL_INSTRUCTION void store16_global(void* to, uint4 bits) {
  {
    const races::Quiet quiet;
    if (self->block->cluster->owns(to)) emulated::fail("a store to global memory of an address in shared memory");
  }
  store16(to, bits);
}

FFCL_INSTRUCTION void copy16_async(void* to, const void* from, bool valid) {
  const races::Quiet quiet;
  emulated::require_aligned(to, 16);
  if (valid) emulated::require_aligned(from, 16);
  if (!self->block->owns(to, 16)) emulated::fail("cp.async outside shared memory");
  if (valid && self->block->cluster->owns(from)) emulated::fail("cp.async from shared memory");
  races::copy(to, valid ? from : nullptr, 16);
  self->copies.push_back([=] { valid ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); });
}
inline void copies_commit() {
  const races::Quiet quiet;
  races::commit();
  self->batches.push_back(std::move(self->copies));
  self->copies.clear();
}
template <int N>
void copies_wait() {
  const races::Quiet quiet;
  races::wait(N);
  for (; self->batches.size() > N; self->batches.pop_front())
    for (const auto& copy : self->batches.front()) copy();
}

// Not exact: the hardware's error is up to 2 units in the last place, and exact results would hide what that costs.
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  if (y < 1.17549435e-38f) return x == x ? 0.f : y;
  return y < 3e38f ? y * (1.f + 6e-8f * static_cast<float>(static_cast<int>(__float_as_uint(x) % 5) - 2)) : y;
}

FFCL_INSTRUCTION void load_matrices(uint32_t (&r)[4], const void* row) {
  const races::Quiet quiet;
  emulated::require_aligned(row, 16);
  if (!self->block->owns(row, 16)) emulated::fail("ldmatrix outside shared memory");
  races::read(row, 16);
  struct Row {
    uint32_t words[4];
  } mine;
  std::memcpy(&mine, row, 16);
  const unsigned lane = self->lane();
  struct Four {
    uint32_t r[4];
  };
  const Four got = emulated::exchange(mine, [&](auto of) {
    Four f;
    for (unsigned m = 0; m < 4; ++m) f.r[m] = of(8 * m + lane / 4).words[lane % 4];
    return f;
  });
  for (int m = 0; m < 4; ++m) r[m] = got.r[m];
}

FFCL_UNWATCHED inline float half_of(uint32_t word, unsigned which, __half) {
  return __half2float({static_cast<uint16_t>(word >> (16 * which))});
}
FFCL_UNWATCHED inline float half_of(uint32_t word, unsigned which, __nv_bfloat16) {
  return __bfloat162float({static_cast<uint16_t>(word >> (16 * which))});
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const races::Quiet quiet;
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned lane = self->lane();
  struct Row {
    float d[4];
  };
  const Row sums = emulated::exchange(mine, [&](auto of) {
    Row s{};
    for (unsigned half = 0; half < 2; ++half)    // this lane's rows lane / 4 and lane / 4 + 8
      for (unsigned n = 0; n < 2; ++n) {         // and columns 2 (lane % 4) and the next
        const unsigned column = 2 * (lane % 4) + n;
        float sum = 0.f;
        for (unsigned quad = 0; quad < 4; ++quad) {
          const Operands left = of(lane / 4 * 4 + quad), right = of(column * 4 + quad);
          for (unsigned far = 0; far < 2; ++far)  // depths 2 quad + pair and 8 further
            for (unsigned pair = 0; pair < 2; ++pair)
              sum += half_of(left.a[half + 2 * far], pair, type) * half_of(right.b[far], pair, type);
        }
        s.d[2 * half + n] = sum;
      }
    return s;
  });
  for (int i = 0; i < 4; ++i) d[i] += sums.d[i];
}

FFCL_UNWATCHED inline unsigned cluster_rank() { return self->block->rank; }
inline void cluster_barrier(bool orders) {
  const races::Quiet quiet;
  emulated::Cluster& cluster = *self->block->cluster;
  cluster.barrier.arrive_and_wait(cluster.blocks.size() * blockDim.x, orders);
  self->started = true;
}
inline void cluster_meet() { cluster_barrier(true); }
inline void cluster_started() { cluster_barrier(false); }
template <class T>
T* in_block(T* p, unsigned rank) {
  const races::Quiet quiet;
  const auto* at = reinterpret_cast<const unsigned char*>(p);
  if (!self->block->owns(at)) emulated::fail("mapa of an address outside shared memory");
  return reinterpret_cast<T*>(self->block->cluster->blocks[rank]->shared + (at - self->block->shared));
}

// An address as instructions see it: bytes from the start of the block's shared memory.
inline uint32_t shared_address(const void* p) {
  const races::Quiet quiet;
  if (!self->block->owns(p)) emulated::fail("an address outside shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - self->block->shared);
}

inline void meet(int id, int threads) {
  const races::Quiet quiet;
  self->block->barriers[id].arrive_and_wait(threads, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a
// ---------------------------------------------------------------------------------------------------------------------
struct CountingBarrier {  // the 64 bits of an mbarrier
  int32_t bytes;
  uint8_t phase, expected, pending, ready;
  static constexpr uint8_t READY = 1, MADE = 2;  // for everyone, for the threads of its block

  bool made() const { return ready == READY || ready == MADE; }
  void settle() {
    if (pending == 0 && bytes == 0) {
      races::phase_ended(this);
      phase ^= 1;
      pending = expected;
      emulated::progress();
    }
  }
  void arrive() {
    if (!made()) emulated::fail("arrival at a barrier that was not initialised");
    if (pending == 0) emulated::fail("more arrivals at a barrier than it expects");
    --pending;
    settle();
  }
};
static_assert(sizeof(CountingBarrier) == 8);

inline CountingBarrier* counting(uint64_t* b) { return reinterpret_cast<CountingBarrier*>(b); }
FFCL_INSTRUCTION void barrier_init(uint64_t* b, int arrivals) {
  const races::Quiet quiet;
  races::init(b);
  *counting(b) = {0, 0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), CountingBarrier::MADE};
  self->fresh.push_back(b);
}
inline void barriers_ready() {
  const races::Quiet quiet;
  for (uint64_t* b : self->fresh) counting(b)->ready = CountingBarrier::READY;
  self->fresh.clear();
}
// For what is not a thread of the barrier's own block.
FFCL_UNWATCHED inline void require_ready(const CountingBarrier* b) {
  if (b->ready == CountingBarrier::MADE)
    emulated::fail("a barrier used by another block or a bulk copy before barriers_ready");
}
FFCL_INSTRUCTION void barrier_expect(uint64_t* b, uint32_t bytes) {
  const races::Quiet quiet;
  races::arrive(b);
  counting(b)->bytes += static_cast<int32_t>(bytes);
  counting(b)->arrive();
}
// A thread may be held up after it has arrived, before it goes on.
FFCL_INSTRUCTION void barrier_arrive(uint64_t* b) {
  const races::Quiet quiet;
  races::arrive(b);
  counting(b)->arrive();
  emulated::pause();
}
FFCL_INSTRUCTION void barrier_arrive(uint64_t* b, unsigned rank) {
  const races::Quiet quiet;
  uint64_t* there = in_block(b, rank);
  races::arrive(there);
  require_ready(counting(there));
  counting(there)->arrive();
  emulated::pause();
}
FFCL_INSTRUCTION bool barrier_passed(uint64_t* b, int parity) {
  const races::Quiet quiet;
  if (!counting(b)->made()) emulated::fail("asking a barrier that was not initialised");
  if (counting(b)->phase == parity) return false;
  races::passed(b);
  return true;
}
FFCL_INSTRUCTION void barrier_wait(uint64_t* b, int parity) {
  const races::Quiet quiet;
  if (!counting(b)->made()) emulated::fail("waiting at a barrier that was not initialised");
  emulated::wait_until([=] { return counting(b)->phase != parity; });
  races::passed(b);
}

// Where the 128-byte swizzle puts a byte.
FFCL_UNWATCHED inline uint32_t swizzled(uint32_t linear) { return linear ^ (linear >> 7 & 7) << 4; }

template <class Map>
FFCL_INSTRUCTION void copy_box_to(unsigned blocks, void* to, const Map* map, uint64_t* b, int x, int y) {
  const races::Quiet quiet;
  const uint32_t at = shared_address(to), barrier = shared_address(b);
  if (at % 1024) emulated::fail("TMA into a place that is no multiple of 1024 bytes");
  emulated::Cluster* cluster = self->block->cluster;
  for (unsigned rank = 0; rank < cluster->blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    unsigned char* shared = cluster->blocks[rank]->shared;
    races::bulk(shared + barrier);
    require_ready(reinterpret_cast<const CountingBarrier*>(shared + barrier));
    for (uint32_t r = 0; r < map->box[1]; ++r) {
      for (uint32_t linear = at + r * 128; linear < at + r * 128 + map->box[0] * 2; linear += 16)
        races::bulk_access(shared + barrier, shared + swizzled(linear), 16, true);
      const int64_t row = y + static_cast<int64_t>(r), depth = static_cast<int64_t>(map->sizes[0]) - x;
      if (row >= 0 && row < static_cast<int64_t>(map->sizes[1]) && depth > 0)
        races::bulk_access(shared + barrier, map->base + row * map->stride + x * 2,
                           std::min<int64_t>(depth, map->box[0]) * 2, false);
    }
  }
  cluster->pending.push_back([=] {
    for (unsigned rank = 0; rank < cluster->blocks.size(); ++rank) {
      if (!(blocks >> rank & 1)) continue;
      unsigned char* shared = cluster->blocks[rank]->shared;
      for (uint32_t r = 0; r < map->box[1]; ++r)
        for (uint32_t d = 0; d < map->box[0]; ++d) {
          const int64_t row = y + static_cast<int64_t>(r), depth = x + static_cast<int64_t>(d);
          uint16_t element = 0;
          if (row >= 0 && row < static_cast<int64_t>(map->sizes[1]) && depth < static_cast<int64_t>(map->sizes[0]))
            std::memcpy(&element, map->base + row * map->stride + depth * 2, 2);
          const uint32_t linear = at + r * 128 + d * 2;
          std::memcpy(shared + swizzled(linear), &element, 2);
        }
      auto* there = reinterpret_cast<CountingBarrier*>(shared + barrier);
      races::delivered(there);
      there->bytes -= static_cast<int32_t>(map->box[0] * map->box[1] * 2);
      there->settle();
    }
  });
}
template <class Map>
FFCL_INSTRUCTION void copy_box(void* to, const Map* map, uint64_t* b, int x, int y) {
  copy_box_to(1u << self->block->rank, to, map, b, x, y);
}

template <int>
void more_registers() {}
template <int>
void fewer_registers() {}

// Products are done when all four warps wait for them: this thread's part of each, in its own time.
FFCL_UNWATCHED inline void products_begin() { self->fenced = true; }
inline void products_commit() {
  const races::Quiet quiet;
  self->fenced = false;
  copies_commit();
}
template <int N>
void products_wait() {
  const races::Quiet quiet;
  copies_wait<N>();
  self->block->groups[self->linear / 128].arrive_and_wait(128, false);  // a product is all four warps'
}

inline void settle(float&) {}

// Where element (row, depth) of an operand is: in the 128-byte swizzle.
FFCL_UNWATCHED inline uint32_t place_of(uint64_t operand, unsigned row, unsigned depth) {
  const uint32_t start = (operand & 0x3fff) << 4, group = (operand >> 32 & 0x3fff) << 4;
  return swizzled(start + row / 8 * group + row % 8 * 128 + depth * 2);
}
template <class T>
FFCL_UNWATCHED float element(const unsigned char* shared, uint64_t operand, unsigned row, unsigned depth, T type) {
  uint16_t bits;
  std::memcpy(&bits, shared + place_of(operand, row, depth), 2);
  return half_of(bits, 0, type);
}
template <class T>
FFCL_UNWATCHED void multiply_now(float (*to)[4], const unsigned char* shared, uint64_t a, uint64_t b, bool add,
                                 unsigned lane, unsigned warp, T type) {
  for (unsigned half = 0; half < 2; ++half) {
    float left[16];
    for (unsigned k = 0; k < 16; ++k) left[k] = element(shared, a, 16 * warp + lane / 4 + 8 * half, k, type);
    for (unsigned n = 0; n < 16; ++n)
      for (unsigned e = 0; e < 2; ++e) {
        float sum = 0.f;
        for (unsigned k = 0; k < 16; ++k) sum += left[k] * element(shared, b, 8 * n + lane % 4 * 2 + e, k, type);
        float& x = to[n][2 * half + e];
        x = add ? x + sum : sum;
      }
  }
}
// Each thread tells of its share of what its warp reads: 16 rows of the first operand, all 128 of the second.
template <class T>
FFCL_INSTRUCTION void multiply_group(float (&d)[16][4], uint64_t a, uint64_t b, bool add, T type) {
  const races::Quiet quiet;
  if (a >> 62 != 1 || b >> 62 != 1) emulated::fail("wgmma in another than the 128-byte swizzle");
  if (!self->fenced) emulated::fail("products without a products_begin");
  float(*to)[4] = d;
  const unsigned char* shared = self->block->shared;
  const unsigned lane = self->lane(), warp = self->linear / 32 % 4;
  races::product(shared + place_of(a, 16 * warp + lane / 2, lane % 2 * 8));
  for (unsigned i = lane; i < 256; i += 32) races::product(shared + place_of(b, i / 2, i % 2 * 8));
  self->copies.push_back([=] { multiply_now(to, shared, a, b, add, lane, warp, type); });
}

}  // namespace
}  // namespace ffcl
