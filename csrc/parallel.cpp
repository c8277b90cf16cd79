#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

namespace ffcl {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Job {
  int64_t tasks;
  Task task;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};

  void work() {
    const int thread = threads.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i, thread);
  }
};

// The process that loaded this, before any fork of its own: OpenMP's threads, whoever started them, do not survive one.
const pid_t owner = getpid();

// GNU OpenMP's entry point, if PyTorch (or anyone) made it globally visible.
GompParallel find_openmp() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == owner ? found : nullptr;
}

}  // namespace

void run_tasks(int64_t tasks, int threads, Task task, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job{tasks, task, context};
  if (threads <= 1) return job.work();
  if (auto openmp = find_openmp())
    return openmp([](void* j) { static_cast<Job*>(j)->work(); }, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back([&job] { job.work(); });
  } catch (const std::system_error&) {
    // No thread to be had: those that started, and this one, do the work.
  }
  job.work();
  for (auto& t : team) t.join();
}

}  // namespace ffcl
