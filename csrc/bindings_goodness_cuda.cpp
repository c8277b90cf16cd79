// Python entry points of goodness_cuda.h; compiled only with the CUDA kernels. Addresses are Tensor.data_ptr(), the
// stream is torch.cuda.Stream.cuda_stream; 0 stands for "none".
#include <pybind11/pybind11.h>

#include "goodness_cuda.h"

namespace py = pybind11;

namespace {

ffcl::GoodnessRows rows(uintptr_t h, int64_t rows, int64_t dim, int64_t stride, int dtype, bool relu, bool mean,
                        float eps, int device, uintptr_t stream) {
  return {reinterpret_cast<const void*>(h), rows, dim, stride, static_cast<ffcl::DType>(dtype), relu, mean, eps, device,
          reinterpret_cast<void*>(stream)};
}

}  // namespace

void bind_goodness_cuda(py::module_& m) {
  py::class_<ffcl::GoodnessRows>(m, "GoodnessRows", "The arguments that both kernels share; see goodness_cuda.h.")
      .def(py::init(&rows), py::arg("h"), py::arg("rows"), py::arg("dim"), py::arg("stride"), py::arg("dtype"),
           py::arg("relu"), py::arg("mean"), py::arg("eps"), py::arg("device"), py::arg("stream"));
  m.def(
      "goodness_forward_cuda",
      [](const ffcl::GoodnessRows& args, uintptr_t goodness, uintptr_t out) {
        return ffcl::goodness_forward_cuda(args, reinterpret_cast<float*>(goodness), reinterpret_cast<void*>(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "goodness_backward_cuda",
      [](const ffcl::GoodnessRows& args, uintptr_t goodness, uintptr_t grad_goodness, uintptr_t grad_out, uintptr_t dh) {
        return ffcl::goodness_backward_cuda(
            args, reinterpret_cast<const float*>(goodness), reinterpret_cast<const float*>(grad_goodness),
            reinterpret_cast<const void*>(grad_out), reinterpret_cast<void*>(dh));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("cuda_error", &ffcl::cuda_error, py::arg("status"), "CUDA's words for a status of one of these kernels.");
}
