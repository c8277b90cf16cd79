// Instruction sets the CPU kernels are compiled for. Every *_cpu.cpp is compiled once per set, inside the namespace
// ffcl::FFCL_ISA_NS, and cpu_dispatch.cpp calls the best one that the processor has.
#pragma once

namespace ffcl {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// Best set of this processor that was compiled in, lowered by the environment variable FFCL_ISA (read once).
Isa current_isa();
const char* isa_name(Isa isa);

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Error codes of every native entry point; Python turns them into exceptions.
enum Status : int { ok = 0, bad_argument = 1, out_of_memory = 2, not_built = 3, cuda_error_base = 1000 };

}  // namespace ffcl
