// Memory that one call of a kernel leaves to the next of the same thread. The C library may hand each call's memory
// back to the system: in a call of a millisecond, as much time again would go into having its pages cleared.
#pragma once

#include <cstddef>

namespace ffcl {

// `bytes` at an address that is a multiple of 64, or null. Their content is undefined.
void* take_scratch(size_t bytes);
// Takes back what take_scratch(bytes) gave. With what is in use, 16 MiB at most are kept, so that a large call has no
// more than its own.
void give_scratch(void* memory, size_t bytes);

}  // namespace ffcl
