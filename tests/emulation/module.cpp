// The Python module _emulated: the entry points of csrc/bindings_*_cuda.cpp over the emulator, and the device to emulate.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_runtime.h"
#include "races_kernels.h"
#include "similarity_plan.h"

namespace emulated {
Device device;
size_t largest_shared = 0;
long launches = 0, good_launches = -1;
unsigned largest_cluster = 1;
}  // namespace emulated

void bind_goodness_cuda(pybind11::module_& m);
void bind_similarity_cuda(pybind11::module_& m);

PYBIND11_MODULE(_emulated, m) {
  bind_goodness_cuda(m);
  bind_similarity_cuda(m);
  m.def("cuda_built", [] { return true; });
  m.def(
      "set_device",
      [](int capability, int processors, int shared, int compiled_for) {
        emulated::device = {capability / 10, capability % 10, processors, shared, compiled_for};
        emulated::largest_cluster = 1;
      },
      pybind11::arg("capability"), pybind11::arg("processors"), pybind11::arg("shared"), pybind11::arg("compiled_for") = 90,
      "Emulate a device of compute capability 80, 90, ... with so many processors and bytes of shared memory a block, "
      "for which the code was compiled, or an older one whose PTX it runs.");
  m.def("largest_cluster", [] { return emulated::largest_cluster; }, "Blocks of the largest cluster on this device.");
  m.def("set_sums_workspace", [](int64_t bytes) { ffcl::sums_workspace_limit = bytes; });
  m.def("fail_after", [](long good) { emulated::good_launches = good; }, "One launch fails, after so many good ones.");
  m.def("set_order", &emulated::set_order, "Threads run in the order that belongs to this seed from now on.");
  m.def("race_names", &ffcl::race_names, "Kernels with a race each.");
  m.def("run_race", &ffcl::run_race, pybind11::arg("name"), pybind11::arg("mended"),
        "One of them, or its mended twin.");
  m.def("launches", [] { return emulated::launches; }, "Kernels launched so far.");
}
