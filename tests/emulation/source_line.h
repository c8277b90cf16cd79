// Where code is, in the words of its source.
#pragma once

#include <string>

namespace emulated {

// The lines of the kernels (*.cu, *.cuh) in which the call that returns to `address` is inlined, innermost first.
std::string source_line(const void* address);

}  // namespace emulated
