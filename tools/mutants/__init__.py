"""The mutants of `make mutate`: what is broken on purpose, and the smallest tests that must see it.

A mutant replaces ``old``, which occurs once in ``file``, by ``new``. ``kind``: "cpu" rebuilds the native module,
"cuda" the emulated one, "triton" runs under Triton's interpreter, "python" needs nothing.
"""

from . import cpu, cuda, python, triton
from .mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = (*cpu.MUTANTS, *triton.MUTANTS, *cuda.MUTANTS, *python.MUTANTS)
