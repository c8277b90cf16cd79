// Instruction sets the CPU kernels are compiled for. Every *_cpu.cpp is compiled once per set, inside the namespace
// ffcl::FFCL_ISA_NS, and cpu_dispatch.cpp calls the best one that the processor has.
#pragma once

namespace ffcl {

// The two with bf16 hold the similarity kernels of bfloat16 rows on products of pairs (tile.h); everything else runs
// the code of the set they are named after. They are never chosen unless FFCL_ISA names them: portable_bf16 does the
// pair product in software, for tests; no machine has yet confirmed avx512_bf16, which runs it as one instruction.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, portable_bf16 = 3, avx512_bf16 = 4 };

// Best of the first three that this processor has and that was compiled in, unless the environment variable FFCL_ISA
// (read once) names another.
Isa current_isa();
const char* isa_name(Isa isa);

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Error codes of every native entry point; Python turns them into exceptions.
enum Status : int { ok = 0, bad_argument = 1, out_of_memory = 2, not_built = 3, cuda_error_base = 1000 };

}  // namespace ffcl
