// Runs every CPU kernel of csrc/ on random ragged problems, for a sanitizer to watch; see tests/test_sanitize.py.
//
//   driver SEED SMALL LARGE CALLERS [OPENMP]
//
// SMALL and LARGE: problems of each kind. CALLERS: threads that call the kernels at once, each with problems of its
// own. OPENMP: a library with GOMP_parallel, on whose threads the kernels run then; without it on std::thread.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "goodness.h"
#include "guarded.h"
#include "similarity.h"

namespace {

using Check = bool (*)(Random&, bool);
constexpr Check CHECKS[] = {check_similarity, check_siglip,  check_contrast, check_goodness,
                            check_pair_cosine, check_pool, check_rows};

int run(uint64_t seed, int small, int large) {
  Random random(seed);
  int wrong = 0;
  for (Check check : CHECKS)
    for (int i = 0; i < small + large; ++i) wrong += !check(random, i >= small);
  return wrong;
}

}  // namespace

int main(int count, char** words) {
  if (count < 5) return std::fprintf(stderr, "driver SEED SMALL LARGE CALLERS [OPENMP]\n"), 2;
  if (count > 5 && !dlopen(words[5], RTLD_NOW | RTLD_GLOBAL)) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  const uint64_t seed = std::strtoull(words[1], nullptr, 10);
  const int small = std::atoi(words[2]), large = std::atoi(words[3]), callers = std::atoi(words[4]);
  std::atomic<int> wrong{check_refusals() ? 0 : 1};
  std::vector<std::thread> team;
  for (int i = 0; i < callers; ++i) team.emplace_back([&wrong, seed, small, large, i] { wrong += run(seed + i, small, large); });
  for (auto& t : team) t.join();
#if !defined(__SANITIZE_THREAD__)
  // After a fork OpenMP has no threads: the kernels must find others.
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) _exit(run(seed + 1000, 2, 1) != 0);
  int status = 0;
  waitpid(child, &status, 0);
  wrong += status != 0;
#endif
  std::printf("%s: %d wrong\n", ffcl::isa_name(ffcl::current_isa()), wrong.load());
  return wrong != 0;
}
