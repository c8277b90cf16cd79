#include "scratch.h"

#include <cstdlib>

namespace ffcl {
namespace {

struct Block {
  void* memory;
  size_t bytes;
};

// Those of a thread, the one that was given back last at the end.
struct Kept {
  static constexpr size_t MOST_BYTES = size_t{16} << 20;
  static constexpr int MOST = 32;
  Block blocks[MOST];
  int count = 0;
  size_t bytes = 0, in_use = 0;

  // Frees the oldest until there is room for `more` beside them and what is in use.
  void make_room(size_t more) {
    while (count && bytes + in_use + more > MOST_BYTES) free(remove(0).memory);
  }
  Block remove(int i) {
    const Block found = blocks[i];
    for (--count; i < count; ++i) blocks[i] = blocks[i + 1];
    bytes -= found.bytes;
    return found;
  }
  ~Kept() {
    while (count) free(remove(count - 1).memory);
  }
};

#ifdef FFCL_SANITIZED  // which would not see who reads beyond a block, or what an earlier call left there
constexpr bool KEEPS = false;
#else
constexpr bool KEEPS = true;
#endif

thread_local Kept kept;

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void* take_scratch(size_t bytes) {
  bytes = whole_lines(bytes);
  void* memory = nullptr;
  for (int i = kept.count - 1; i >= 0 && !memory; --i)
    if (kept.blocks[i].bytes == bytes) memory = kept.remove(i).memory;
  if (!memory) {
    kept.make_room(bytes);
    memory = aligned_alloc(64, bytes);
  }
  if (memory) kept.in_use += bytes;
  return memory;
}

void give_scratch(void* memory, size_t bytes) {
  bytes = whole_lines(bytes);
  if (!memory) return;
  kept.in_use -= bytes;
  if (kept.count == Kept::MOST) free(kept.remove(0).memory);
  kept.make_room(bytes);
  if (!KEEPS || kept.in_use + bytes > Kept::MOST_BYTES) return free(memory);
  kept.blocks[kept.count++] = {memory, bytes};
  kept.bytes += bytes;
}

}  // namespace ffcl
