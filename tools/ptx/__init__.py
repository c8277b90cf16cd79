"""Runs the PTX that Triton compiles for sm_90 or sm_80 on numpy, one block after the other, so that tests of the
kernels exercise what the compiler made of them where there is no GPU: `make test-ptx`.

Modelled: registers by width, divergent branches, barriers, the global memory of a launch's tensors (every access must
lie in one of them, aligned), shared memory, cp.async, TMA loads and stores with their mbarriers, boxes and swizzles,
ldmatrix, stmatrix, mma.sync, wgmma with its descriptors. Asynchronous work ends as late as the waits allow: until then
its destination is poison (0xFF bytes, a NaN as float32, bf16 or f16), and what it reads must stay as it was when it
began. Shared memory and registers begin as poison, and the blocks of a grid come in any order. So a missing wait, a
buffer overwritten too early or a read past a tensor shows.

Not modelled: races, between warps or blocks, for all threads of a block that share a program counter go in step and
blocks run one after the other; time; ptxas, and what it makes of the PTX; fences of memory and proxies; clusters, TF32,
descriptors without a swizzle; the last bits of products (wgmma and mma.sync add up in float64 and round once) and of
approximate functions, which are rounded correctly.

The names of sections in the docstrings are those of NVIDIA's "PTX ISA" manual.
"""
