#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <random>

namespace emulated {

Thread* self = nullptr;
Index grid, block_size;

namespace {

constexpr size_t STACK = 64 << 10;

ucontext_t scheduler;
std::string failure;
unsigned long happened = 0;
const std::function<void()>* kernel = nullptr;
std::mt19937 order(20250101);
const Warp* held = nullptr;  // a warp that does not go on while anything else moves
std::vector<std::unique_ptr<char[]>> stacks;

void trampoline() {
  races::quiet = false;
  (*kernel)();
  races::quiet = true;
  if (--self->block->running == 0) races::block_ended(*self->block);
  self->done = true;
  progress();
  swapcontext(&self->context, &scheduler);
}

void start(Thread& thread, char* stack) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, trampoline, 0);
}

// Floats, halves and bfloat16s of this pattern are all NaN.
void poison(unsigned char* memory, size_t size) { std::memset(memory, 0xff, size); }

void run_cluster(const Launch& launch, unsigned first) {
  const unsigned size = launch.block.x * launch.block.y * launch.block.z;
  Cluster cluster;
  cluster.pitch = (launch.shared / 1024 + 2) * 1024;
  cluster.storage = std::make_unique<unsigned char[]>((launch.cluster + 1) * cluster.pitch);
  cluster.arena =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(cluster.storage.get()) + 1023) / 1024 * 1024);
  poison(cluster.arena, launch.cluster * cluster.pitch);
  std::vector<Thread> threads(static_cast<size_t>(size) * launch.cluster);
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    const unsigned linear = first + rank;
    block->index = {linear % launch.grid.x, linear / launch.grid.x % launch.grid.y,
                    linear / launch.grid.x / launch.grid.y};
    block->rank = rank;
    block->cluster = &cluster;
    block->shared_size = launch.shared;
    block->shared = cluster.arena + rank * cluster.pitch;
    block->running = size;
    block->warps.resize((size + 31) / 32);
    for (unsigned t = 0; t < size; ++t) {
      Thread& thread = threads[rank * size + t];
      thread.index = {t % launch.block.x, t / launch.block.x % launch.block.y, t / launch.block.x / launch.block.y};
      thread.linear = t;
      thread.block = block.get();
      ++block->warps[t / 32].lanes;
    }
    block->groups.resize((size + 127) / 128);
    cluster.blocks.push_back(std::move(block));
  }
  while (stacks.size() < threads.size()) stacks.push_back(std::make_unique<char[]>(STACK));
  for (size_t i = 0; i < threads.size(); ++i) start(threads[i], stacks[i].get());

  races::begin_cluster(cluster, threads);

  std::vector<Thread*> alive;
  for (Thread& thread : threads) alive.push_back(&thread);
  held = nullptr;
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), order);
    const unsigned long before = happened;
    for (Thread* thread : alive) {
      if (thread->done || &thread->warp() == held) continue;
      self = thread;
      races::run_on(thread->context.uc_stack.ss_sp, STACK);
      swapcontext(&scheduler, &thread->context);
      if (!failure.empty()) throw std::runtime_error(failure);
    }
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Thread* t) { return t->done; }), alive.end());
    // Bulk copies arrive when nothing else moves, as late as they can, but before a warp that is held up goes on.
    if (happened == before) {
      if (cluster.pending.empty() && !held) throw std::runtime_error("deadlock: every thread waits");
      if (cluster.pending.empty()) {
        held = nullptr;
        continue;
      }
      const auto copy = std::move(cluster.pending.front());
      cluster.pending.pop_front();
      copy();
    }
  }
  for (const auto& block : cluster.blocks) {
    for (const Barrier& barrier : block->barriers)
      if (!barrier.idle()) throw std::runtime_error("a block ended with threads missing at a barrier");
    for (size_t i = launch.shared; i < cluster.pitch; ++i)
      if (block->shared[i] != 0xff) throw std::runtime_error("written past the end of shared memory");
  }
  if (!cluster.pending.empty()) throw std::runtime_error("a cluster ended before its bulk copies");
}

}  // namespace

void yield() {
  Thread* const me = self;
  swapcontext(&me->context, &scheduler);
  self = me;
}

void progress() { ++happened; }

void pause() {
  if (!held && order() % 8 == 0) held = &self->warp();
  yield();
  progress();
}

void fail(const std::string& what) {
  failure = what;
  races::quiet = true;
  for (;;) swapcontext(&self->context, &scheduler);
}

void set_order(unsigned seed) { order.seed(seed); }

void run(const Launch& launch, const std::function<void()>& body) {
  failure.clear();
  races::begin_launch(&launch);
  kernel = &body;
  grid = launch.grid;
  block_size = launch.block;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (blocks % launch.cluster) throw std::runtime_error("the grid is no multiple of the cluster");
  for (unsigned first = 0; first < blocks; first += launch.cluster) run_cluster(launch, first);
}

}  // namespace emulated
