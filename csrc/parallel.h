// Threads for the CPU kernels. No pool of our own: inside a PyTorch process the tasks run on the OpenMP threads that
// PyTorch already has (its spinning workers would otherwise fight ours for the cores), elsewhere, and after a fork, on
// std::thread. Compiled with baseline flags only, so that no AVX code leaks into shared symbols.
#pragma once

#include <cstdint>

namespace ffcl {

using Task = void (*)(void* context, int64_t index, int thread);

// Calls task(context, i, thread) once for every i in [0, tasks), thread in [0, threads); returns when all have ended.
// Tasks are handed out in order of i; which thread takes which is not defined, so results must not depend on it.
void run_tasks(int64_t tasks, int threads, Task task, void* context);

}  // namespace ffcl
