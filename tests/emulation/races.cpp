#include "races.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <unordered_map>

#include "emulator.h"
#include "source_line.h"

namespace emulated::races {

bool quiet = true;

namespace {

using Seen = std::shared_ptr<const Times>;

struct Access {
  uint32_t cluster, actor, time;
  uint16_t owner;  // the thread that it was done for
  uint16_t bytes;  // of a cell, a bit each
  Engine engine;
  bool write;
  const void* where;
};

// The accesses to 16 bytes that a later one may still race with.
constexpr size_t CELL = 16, PAGE = 4096;
using Cell = std::vector<Access>;
using Page = std::array<Cell, PAGE / CELL>;

struct CountingClock {
  Times next;  // what has arrived in this phase
  Seen last;   // in the one before
  uint32_t engine, begun = 0, ended = 0;
};

Cluster* cluster = nullptr;
Thread* first_thread = nullptr;
uint32_t cluster_number = 0, actors = 0, threads_each = 0;
std::vector<Cell> shared;  // of all blocks of the cluster
std::unordered_map<uintptr_t, Page> global;
uintptr_t page_at = 0;
Page* page = nullptr;
std::unordered_map<const void*, CountingClock> barriers;
std::map<unsigned, uint32_t> groups;  // actors of warpgroups
uintptr_t stack = 0, stack_size = 0, host_stack = 0;
constexpr uintptr_t ARGUMENTS = 1 << 17;  // bytes of the host's stack that have a launch's arguments

void raise(Times& to, uint32_t actor, uint32_t time) {
  if (actor >= to.size()) to.resize(std::max(actors, actor + 1));
  to[actor] = std::max(to[actor], time);
}
void raise(Times& to, const Times& by) {
  if (to.size() < by.size()) to.resize(by.size());
  for (size_t i = 0; i < by.size(); ++i) to[i] = std::max(to[i], by[i]);
}

// The threads of a group see the same and wait for the same, one after the other: the last unions are kept.
Seen both(const Seen& a, const Seen& b) {
  struct Union {
    Seen a, b, all;
  };
  static std::array<Union, 8> known;
  static unsigned next = 0;
  if (a == b) return a;
  for (const Union& u : known)
    if (u.a == a && u.b == b) return u.all;
  auto all = std::make_shared<Times>(*a);
  raise(*all, *b);
  known[next++ % known.size()] = {a, b, all};
  return all;
}

// All that the thread knows and did so far, into `to`; what it does from now on is not part of that.
void release(Times& to, Clock& c, const Times*& last_seen) {
  if (last_seen != c.seen.get()) raise(to, *c.seen);
  last_seen = c.seen.get();
  raise(to, c.actor, c.time++);
  if (c.engine != NOBODY) raise(to, c.engine, c.done);
}
void release(Times& to, Clock& c) {
  const Times* none = nullptr;
  release(to, c, none);
}

bool before(const Access& a, const Clock& c) {
  if (a.cluster != cluster_number) return false;
  if (a.actor == c.actor) return true;
  if (a.actor == c.engine) return a.time <= c.done;
  return a.actor < c.seen->size() && (*c.seen)[a.actor] >= a.time;
}

std::string block_number(uint32_t in_cluster, size_t rank) {
  return std::to_string((in_cluster - 1) * cluster->blocks.size() + rank);
}

std::string described(const Access& a) {
  static const char* const engines[] = {"", " by cp.async", " by TMA", " by wgmma"};
  return std::string(a.write ? "write" : "read") + engines[static_cast<int>(a.engine)] + " of thread " +
         std::to_string(a.owner % threads_each) + " of block " + block_number(a.cluster, a.owner / threads_each) +
         " (" + source_line(a.where) + ")";
}

std::string place(uintptr_t at) {
  const auto base = reinterpret_cast<uintptr_t>(cluster->arena);
  if (at - base >= cluster->blocks.size() * cluster->pitch) {
    char text[64];
    std::snprintf(text, sizeof text, "global memory at 0x%zx", static_cast<size_t>(at));
    return text;
  }
  return "byte " + std::to_string((at - base) % cluster->pitch) + " of block " +
         block_number(cluster_number, (at - base) / cluster->pitch) + "'s shared memory";
}

[[noreturn]] void race(const char* what, const Access& old, const Access& now, uintptr_t at) {
  const unsigned common = old.bytes & now.bytes;
  fail(std::string(what) + " in " + place(at + (common ? __builtin_ctz(common) : 0)) + ": " + described(now) +
       ", and before it " + described(old));
}

// The async proxy (TMA, wgmma) does not see what others wrote to shared memory without fence.proxy.async, which
// ptx.cuh does not have.
bool past_proxy(const Access& old, const Access& now) {
  const auto async = [](Engine e) { return e == Engine::bulk || e == Engine::products; };
  return old.write && !async(old.engine) && async(now.engine);
}

void touch(Cell& cell, const Access& now, uintptr_t at, bool keep) {
  const Clock& clock = self->clock;
  unsigned elsewhere = 0;  // read by other clusters: one read of each byte is enough for any write to race with
  bool known = false;
  size_t kept = 0;
  for (size_t i = 0; i < cell.size(); ++i) {
    Access old = cell[i];
    const bool ordered = before(old, clock);
    if (old.bytes & now.bytes) {
      if ((old.write || now.write) && !ordered) race("race", old, now, at);
      if (past_proxy(old, now)) race("no proxy fence", old, now, at);
    }
    if (!keep) continue;
    if (!old.write && old.cluster != cluster_number) {
      if (!(old.bytes & ~elsewhere)) continue;
      elsewhere |= old.bytes;
    } else if (old.actor == now.actor && old.time == now.time && old.write == now.write && old.engine != Engine::none) {
      old.bytes |= now.bytes;
      known = true;
    } else if (ordered && (now.write || !old.write)) {  // who races with the old one races with this one
      old.bytes &= ~now.bytes;
    }
    if (old.bytes) cell[kept++] = old;
  }
  if (!keep) return;
  cell.resize(kept);
  if (!known && (now.write || (now.bytes & ~elsewhere))) cell.push_back(now);
}

Cell* cell_of(uintptr_t at, const Access& now) {
  const uintptr_t offset = at - reinterpret_cast<uintptr_t>(cluster->arena);
  if (offset < cluster->blocks.size() * cluster->pitch) {
    const size_t rank = offset / cluster->pitch;
    if (rank != self->block->rank) {
      const char* wrong = !self->started                    ? "may not have started"
                          : !cluster->blocks[rank]->running ? "has ended"
                                                            : nullptr;
      if (wrong) fail("shared memory of a block that " + (wrong + (": " + described(now))));
    }
    if (offset % cluster->pitch + 32 - __builtin_clz(now.bytes) > cluster->blocks[rank]->shared_size)
      fail("past the end of shared memory: " + described(now));
    return &shared[offset / CELL];
  }
  if (at / PAGE != page_at) {
    page_at = at / PAGE;
    page = &global[page_at];
  }
  return &(*page)[at % PAGE / CELL];
}

void touch(const void* p, size_t bytes, Access now, bool keep = true) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t at = begin / CELL * CELL; at < end; at += CELL) {
    const unsigned first = begin > at ? begin - at : 0, last = std::min<uintptr_t>(end - at, CELL);
    now.bytes = ((1u << last) - 1) & ~((1u << first) - 1);
    touch(*cell_of(at, now), now, at, keep);
  }
}

Access access(uint32_t actor, uint32_t time, Engine engine, bool write, const void* where) {
  return {cluster_number, actor, time, static_cast<uint16_t>(self->clock.actor), 0, engine, write, where};
}
Access of_thread(bool write, const void* where) {
  return access(self->clock.actor, self->clock.time, Engine::none, write, where);
}

CountingClock& counting(const void* barrier) {
  auto [at, fresh] = barriers.try_emplace(barrier);
  if (fresh) {
    at->second.last = std::make_shared<Times>();
    at->second.engine = actors++;
  }
  return at->second;
}

// The barrier must be known to be initialised; what another block does to it is kept, for block_ended.
void use(const void* barrier, const void* where) {
  touch(barrier, 8, of_thread(false, where), !self->block->owns(barrier));
}

}  // namespace

Quiet::Quiet() : before_(quiet) { quiet = true; }
Quiet::~Quiet() { quiet = before_; }

void begin_launch(const void* here) {
  host_stack = reinterpret_cast<uintptr_t>(here) - ARGUMENTS / 2;
  global.clear();
  page_at = cluster_number = 0;
}

void begin_cluster(Cluster& c, std::vector<Thread>& threads) {
  ++cluster_number;
  cluster = &c;
  first_thread = threads.data();
  threads_each = threads.size() / c.blocks.size();
  actors = 0;
  barriers.clear();
  groups.clear();
  const size_t cells = c.blocks.size() * c.pitch / CELL;
  if (shared.size() < cells) shared.resize(cells);
  for (size_t i = 0; i < cells; ++i) shared[i].clear();
  const auto nothing = std::make_shared<Times>(threads.size());
  for (Thread& thread : threads) {
    thread.clock.actor = actors++;
    thread.clock.seen = nothing;
  }
}

void run_on(const void* s, size_t size) {
  stack = reinterpret_cast<uintptr_t>(s);
  stack_size = size;
}

// Other blocks' accesses to its shared memory must be over, and all bulk copies to it.
void block_ended(const Block& block) {
  if (cluster->blocks.size() == 1 && barriers.empty()) return;
  Times all;
  const Times* last_seen = nullptr;
  for (uint32_t t = 0; t < threads_each; ++t)
    release(all, first_thread[block.rank * threads_each + t].clock, last_seen);
  const size_t cells = cluster->pitch / CELL;
  for (size_t i = block.rank * cells; i < (block.rank + 1) * cells; ++i)
    for (const Access& a : shared[i])
      if ((a.owner / threads_each != block.rank || a.engine == Engine::bulk) &&
          (a.actor >= all.size() || all[a.actor] < a.time))
        fail("a block ended that may not have seen the end of an access to " +
             place(reinterpret_cast<uintptr_t>(cluster->arena) + i * CELL) + ": " + described(a));
}

void accessed(const void* p, size_t bytes, bool write, const void* where) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (quiet || at - stack < stack_size) return;
  if (at - host_stack < ARGUMENTS) return;
  touch(p, bytes, of_thread(write, where));
}
void read(const void* p, size_t bytes) { touch(p, bytes, of_thread(false, __builtin_return_address(0))); }

void meet(const std::vector<Thread*>& threads) {
  auto all = std::make_shared<Times>();
  const Times* last_seen = nullptr;
  for (Thread* thread : threads) release(*all, thread->clock, last_seen);
  for (Thread* thread : threads) thread->clock.seen = all;
}

void copy(void* to, const void* from, size_t bytes) {
  const void* where = __builtin_return_address(0);
  Clock& c = self->clock;
  if (c.engine == NOBODY) c.engine = actors++;
  if (groups.count(c.actor / 128) && groups[c.actor / 128] == c.engine)
    fail("cp.async by a thread that also multiplies by wgmma, of which races.cpp has one clock for both");
  if (from) touch(from, bytes, access(c.engine, c.batch, Engine::copies, false, where));
  touch(to, bytes, access(c.engine, c.batch, Engine::copies, true, where));
}

void product(const void* operand) {
  Clock& c = self->clock;
  if (c.engine == NOBODY) {
    auto [at, fresh] = groups.try_emplace(c.actor / 128);
    if (fresh) at->second = actors++;
    c.engine = at->second;
  }
  touch(operand, 16, access(c.engine, c.batch, Engine::products, false, __builtin_return_address(0)));
}

void commit() { ++self->clock.batch; }
void wait(unsigned left) {
  Clock& c = self->clock;
  if (c.batch > left + 1) c.done = std::max(c.done, c.batch - left - 1);
}

void init(const uint64_t* barrier) { touch(barrier, 8, of_thread(true, __builtin_return_address(0))); }
void arrive(const uint64_t* barrier) {
  use(barrier, __builtin_return_address(0));
  release(counting(barrier).next, self->clock);
}
void passed(const uint64_t* barrier) {
  use(barrier, __builtin_return_address(0));
  self->clock.seen = both(self->clock.seen, counting(barrier).last);
}
void phase_ended(const void* barrier) {
  CountingClock& c = counting(barrier);
  c.last = std::make_shared<Times>(std::move(c.next));
  c.next.clear();
}

void bulk(const void* barrier) {
  touch(barrier, 8, of_thread(false, __builtin_return_address(0)), false);
  ++counting(barrier).begun;
}
void bulk_access(const void* barrier, const void* p, size_t bytes, bool write) {
  const CountingClock& c = counting(barrier);
  touch(p, bytes, access(c.engine, c.begun, Engine::bulk, write, __builtin_return_address(0)));
}
void delivered(const void* barrier) {
  CountingClock& c = counting(barrier);
  raise(c.next, c.engine, ++c.ended);
}

}  // namespace emulated::races
