// Large fresh outputs on huge pages. A kernel that writes a tensor nobody has touched spends most of its time in page
// faults: two outputs of 51 MB took 54 ms on 4 KiB pages and 27 ms on 2 MiB ones, where the arithmetic takes 9 (Zen 3).
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ffcl {

// Asks for huge pages in [start, start + bytes). A hint: pages that exist stay as they are, failure changes nothing.
static inline void prefer_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t{2} << 20;
  if (!start || bytes < int64_t{2} * static_cast<int64_t>(PAGE)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) & ~(PAGE - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace ffcl
