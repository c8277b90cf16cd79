// Stands in for GNU OpenMP, whose own synchronisation ThreadSanitizer does not see: the one entry point that
// csrc/parallel.cpp looks up, over std::thread. Built as a library of its own, so that the driver chooses.
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, data);
  body(data);
  for (auto& t : team) t.join();
}
