"""The small GPU tests themselves, under the interpreter: what memcheck is to run does run, and is right."""

import test_gpu_small

# The tests alone: the mark that skips them without a GPU stays with their module.
globals().update({name: value for name, value in vars(test_gpu_small).items() if name.startswith("test_")})
