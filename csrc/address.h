// How tensors come from Python: as addresses, Tensor.data_ptr(); 0 stands for "none".
#pragma once

#include <cstdint>

namespace ffcl {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace ffcl
