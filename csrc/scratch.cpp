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
  size_t bytes = 0;

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
  for (int i = kept.count - 1; i >= 0; --i)
    if (kept.blocks[i].bytes == bytes) return kept.remove(i).memory;
  return aligned_alloc(64, bytes);
}

void give_scratch(void* memory, size_t bytes) {
  bytes = whole_lines(bytes);
  if (!memory) return;
  if (!KEEPS || bytes > Kept::MOST_BYTES / 4) return free(memory);
  while (kept.count == Kept::MOST || kept.bytes + bytes > Kept::MOST_BYTES) free(kept.remove(0).memory);
  kept.blocks[kept.count++] = {memory, bytes};
  kept.bytes += bytes;
}

}  // namespace ffcl
