// Instruction sets the CPU kernels are compiled for. Every *_cpu.cpp is compiled once per set, inside the namespace
// ffcl::FFCL_ISA_NS, and cpu_dispatch.cpp calls the best one that the processor has.
#pragma once

namespace ffcl {

// Those after avx512 hold the similarity kernels of bfloat16 rows on products of pairs (tile.h); everything else runs
// the code of portable or avx512. avx512_bf16 has the vector instruction, amx the tile registers of Intel's servers;
// portable_bf16 and portable_amx do the same in software, for tests.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, portable_bf16 = 3, avx512_bf16 = 4, portable_amx = 5, amx = 6 };

// Best of portable, avx2, avx512, avx512_bf16 and amx that this processor has and that was compiled in, unless the
// environment variable FFCL_ISA (read once) names another; avx512_bf16 only where it pays.
Isa current_isa();
const char* isa_name(Isa isa);

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Error codes of every native entry point; Python turns them into exceptions.
enum Status : int { ok = 0, bad_argument = 1, out_of_memory = 2, not_built = 3, cuda_error_base = 1000 };

}  // namespace ffcl
