// The Python module ffcl_fast._native. Knows nothing of PyTorch: tensors arrive as addresses (Tensor.data_ptr()) with
// sizes, strides and, on CUDA, a stream; entry points return a Status, which ffcl_fast/backends/ turns into exceptions.
//
// One bind_xxx function for each family of kernels, in a file bindings_xxx.cpp, declared and called here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "isa.h"

namespace py = pybind11;

void bind_contrast(py::module_& m);  // bindings_contrast.cpp
void bind_goodness(py::module_& m);  // bindings_goodness.cpp
void bind_similarity(py::module_& m);  // bindings_similarity.cpp
void bind_goodness_cuda(py::module_& m);  // bindings_goodness_cuda.cpp, where nvcc was found
void bind_similarity_cuda(py::module_& m);  // bindings_similarity_cuda.cpp, where nvcc was found

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// What was built
// ---------------------------------------------------------------------------------------------------------------------

#ifdef FFCL_CUDA_BUILT
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#define FFCL_CUDA_VERSION ""
#define FFCL_CUDA_ARCHS ""
#endif

std::vector<std::string> split(const char* list) {
  std::vector<std::string> parts;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

void bind_build(py::module_& m) {
  m.def("version", [] { return FFCL_VERSION; }, "Version of the package this module was built from.");
  m.def("cuda_built", [] { return kCudaBuilt; }, "Whether the CUDA kernels were compiled in.");
  m.def(
      "isa", [] { return std::string(ffcl::isa_name(ffcl::current_isa())); },
      "Instruction set the CPU kernels run with. ValueError or RuntimeError where FFCL_ISA names one that does not "
      "exist or that this processor lacks.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FFCL_VERSION;
        info["isas"] = split(FFCL_ISAS);
        info["compiler"] = __VERSION__;
        info["cuda"] = kCudaBuilt ? py::object(py::str(FFCL_CUDA_VERSION)) : py::object(py::none());
        info["cuda_archs"] = split(FFCL_CUDA_ARCHS);
        return info;
      },
      "version; isas: instruction sets compiled in; compiler; cuda: toolkit version or None; cuda_archs.");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of ffcl_fast. Internal: use ffcl_fast.functional.";
  bind_build(m);
  bind_contrast(m);
  bind_goodness(m);
  bind_similarity(m);
#ifdef FFCL_CUDA_BUILT
  bind_goodness_cuda(m);
  bind_similarity_cuda(m);
#endif
}
