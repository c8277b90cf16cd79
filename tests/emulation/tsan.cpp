// What compilers call under -fsanitize=thread, in place of the sanitizer's own library.
#include <cstddef>
#include <cstring>

#include "races.h"

#define FFCL_ACCESS(NAME, BYTES, WRITE) \
  void __tsan_##NAME(void* p) { emulated::races::accessed(p, BYTES, WRITE, __builtin_return_address(0)); }
#define FFCL_ACCESSES(BYTES)                       \
  FFCL_ACCESS(read##BYTES, BYTES, false)           \
  FFCL_ACCESS(write##BYTES, BYTES, true)           \
  FFCL_ACCESS(unaligned_read##BYTES, BYTES, false) \
  FFCL_ACCESS(unaligned_write##BYTES, BYTES, true) \
  FFCL_ACCESS(volatile_read##BYTES, BYTES, false)  \
  FFCL_ACCESS(volatile_write##BYTES, BYTES, true)

extern "C" {
FFCL_ACCESSES(1)
FFCL_ACCESSES(2)
FFCL_ACCESSES(4)
FFCL_ACCESSES(8)
FFCL_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) {
  emulated::races::accessed(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulated::races::accessed(p, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Clang's.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  emulated::races::accessed(from, bytes, false, __builtin_return_address(0));
  emulated::races::accessed(to, bytes, true, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  emulated::races::accessed(to, bytes, true, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
}
