// Finds races whatever order the threads ran in, by vector clocks: two accesses to the same bytes, of which one is a
// write, must be ordered by barriers. The compiler tells of every access (-fsanitize=thread, whose runtime races.cpp
// stands in for), the emulated instructions tell of their own and of what orders them.
//
// What the hardware does in the background has clocks of its own: the copies of a thread by cp.async, the products of a
// warpgroup, the bulk copies that a barrier counts. Such a piece is after what its thread did before it, and before
// what follows a wait for it. __shfl_sync, ldmatrix, mma and the like order nothing. Blocks of different clusters are
// never ordered, though they run one after the other here.
//
// What it cannot see: registers that products under way write (the emulator does those as late as it can), a race on a
// path that the threads did not take, and what GCC leaves to the C library (memcpy and memset of other sizes than an
// element's or 16 bytes). There are no atomics and no proxy fences to know of: csrc/ has none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// For accessors of the emulator's own state, which is no memory of the device.
#define FFCL_UNWATCHED __attribute__((no_sanitize("thread")))
// For what tells of accesses, so that they are the caller's line's.
#define FFCL_INSTRUCTION __attribute__((always_inline)) inline

namespace emulated {

struct Thread;
struct Block;
struct Cluster;

namespace races {

using Times = std::vector<uint32_t>;  // by actor: which of its times, and all before, are known to be over
constexpr uint32_t NOBODY = ~0u;

struct Clock {
  std::shared_ptr<const Times> seen;  // of the others
  uint32_t actor = 0, time = 1;
  uint32_t engine = NOBODY;  // what works for this thread in batches: copies or products
  uint32_t batch = 1, done = 0;
};

enum class Engine : uint8_t { none, copies, bulk, products };

extern bool quiet;  // the emulator runs, not the kernel: nothing is an access

// For the length of an emulated instruction.
class Quiet {
 public:
  Quiet();
  ~Quiet();

 private:
  const bool before_;
};

void begin_launch(const void* host_stack);
void begin_cluster(Cluster& cluster, std::vector<Thread>& threads);
void run_on(const void* stack, size_t size);  // where the thread that runs now has its own variables
void block_ended(const Block& block);

void accessed(const void* p, size_t bytes, bool write, const void* where);  // by the kernel's code
void read(const void* p, size_t bytes);  // by an instruction

void meet(const std::vector<Thread*>& threads);  // what any did before, all see after

void copy(void* to, const void* from, size_t bytes);  // in the batch that this thread fills; from null: zeros
void product(const void* operand);  // reads 16 bytes of an operand, in the batch of its group
void commit();
void wait(unsigned left);  // for all but so many of this thread's batches

void init(const uint64_t* barrier);
void arrive(const uint64_t* barrier);
void passed(const uint64_t* barrier);
void phase_ended(const void* barrier);
void bulk(const void* barrier);  // a bulk copy that this barrier counts begins: what it accesses
void bulk_access(const void* barrier, const void* p, size_t bytes, bool write);
void delivered(const void* barrier);  // the first of them that was not is

}  // namespace races
}  // namespace emulated
