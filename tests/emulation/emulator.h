// A CUDA device on the CPU, for tests: the kernels of csrc/*.cu are compiled unchanged by the C++ compiler, with this
// folder in place of the toolkit's headers, and every thread of a cluster of blocks runs as a fiber.
//
// It is made to find mistakes, not to be fast. The order of the threads is random. Shared memory starts as NaN.
// What the hardware does asynchronously (cp.async, TMA, wgmma) is done as late as the program's waits allow, so that a
// missing wait reads poison. Threads that wait for each other for ever, misaligned vector accesses, barriers that a
// block leaves behind and races (races.h) are errors. Blocks of different clusters run one after the other.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

namespace emulated {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

void yield();     // let the other threads run
void progress();  // something happened that may let a waiting thread go on
void pause();     // let them run although this one could go on; at times its warp is held up until nothing else moves

template <class Condition>
void wait_until(Condition holds) {
  while (!holds()) yield();
  progress();
}

[[noreturn]] void fail(const std::string& what);

extern Thread* self;  // the thread that runs
extern Index grid, block_size;

class Barrier {
 public:
  // `orders`: what its threads did before comes before what they do after.
  void arrive_and_wait(unsigned expected, bool orders) {
    const races::Quiet quiet;
    const unsigned mine = generation_;
    if (orders) meeting_.push_back(self);
    if (++arrived_ == expected) {
      if (orders) races::meet(meeting_);
      meeting_.clear();
      arrived_ = 0;
      ++generation_;
      progress();
    } else {
      wait_until([&] { return generation_ != mine; });
    }
  }
  bool idle() const { return arrived_ == 0; }

 private:
  unsigned arrived_ = 0, generation_ = 0;
  std::vector<Thread*> meeting_;
};

struct Warp {
  Barrier barrier;
  unsigned char slots[32][64];  // what each lane shows to the others
  unsigned lanes = 0;
};

struct Block {
  Index index;
  unsigned rank = 0;  // in its cluster
  struct Cluster* cluster = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_size = 0;
  unsigned running = 0;  // threads
  std::vector<Warp> warps;
  std::vector<Barrier> groups;  // the four warps that issue one wgmma
  Barrier barriers[16];  // 0 is __syncthreads
  bool any = false;  // of __syncthreads_or

  FFCL_UNWATCHED bool owns(const void* p, size_t bytes = 1) const {
    return p >= shared && static_cast<const unsigned char*>(p) + bytes <= shared + shared_size;
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* arena = nullptr;  // the blocks' shared memory, `pitch` bytes apart
  size_t pitch = 0;

  FFCL_UNWATCHED bool owns(const void* p) const { return p >= arena && p < arena + blocks.size() * pitch; }
  Barrier barrier;
  std::deque<std::function<void()>> pending;  // bulk copies under way
};

struct Thread {
  Index index;
  unsigned linear = 0;
  Block* block = nullptr;
  std::vector<std::function<void()>> copies;               // cp.async since the last commit
  std::deque<std::vector<std::function<void()>>> batches;  // committed, not yet waited for
  ucontext_t context;
  races::Clock clock;
  bool started = false;  // it knows that all blocks of the cluster have
  bool fenced = false;   // its registers are ready for a batch of products
  std::vector<uint64_t*> fresh;  // barriers that it made, not yet ready for other blocks and bulk copies
  bool done = false;

  Warp& warp() const { return block->warps[linear / 32]; }
  unsigned lane() const { return linear % 32; }
  unsigned lanes() const { return warp().lanes; }
};

struct Launch {
  Index grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
};

// Runs `body` once for every thread of the grid. Throws std::runtime_error on the errors above.
void run(const Launch&, const std::function<void()>& body);

void set_order(unsigned seed);  // of the threads, from now on

FFCL_UNWATCHED inline Index thread_index() { return self->index; }
FFCL_UNWATCHED inline Index block_index() { return self->block->index; }

FFCL_UNWATCHED inline void require_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

// `mine` of every lane of the warp, by lane. All lanes call it.
template <class T, class Use>
auto exchange(const T& mine, Use use) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  const races::Quiet quiet;
  Warp& warp = self->warp();
  std::memcpy(warp.slots[self->lane()], &mine, sizeof(T));
  warp.barrier.arrive_and_wait(warp.lanes, false);
  auto result = use([&](unsigned lane) {
    T other;
    std::memcpy(&other, warp.slots[lane], sizeof(T));
    return other;
  });
  warp.barrier.arrive_and_wait(warp.lanes, false);
  return result;
}

}  // namespace emulated
