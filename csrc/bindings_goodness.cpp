// Python entry points of goodness.h.
#include <pybind11/pybind11.h>

#include "address.h"
#include "goodness.h"

namespace py = pybind11;
using ffcl::pointer;

namespace {

ffcl::Activations activations(uintptr_t h, int64_t rows, int64_t dim, int64_t stride, int dtype, bool relu,
                              int threads) {
  return {pointer<const void>(h), rows, dim, stride, static_cast<ffcl::DType>(dtype), relu, threads};
}

ffcl::Maps maps(uintptr_t h, int64_t samples, int64_t channels, int64_t positions, int64_t stride, bool channels_last,
                int dtype, bool relu, int threads) {
  return {pointer<const void>(h),          samples, channels, positions, stride, channels_last,
          static_cast<ffcl::DType>(dtype), relu,    threads};
}

}  // namespace

void bind_goodness(py::module_& m) {
  py::class_<ffcl::Activations>(m, "Activations", "Rows that the goodness kernels read; see goodness.h.")
      .def(py::init(&activations), py::arg("h"), py::arg("rows"), py::arg("dim"), py::arg("stride"), py::arg("dtype"),
           py::arg("relu"), py::arg("threads"));
  py::class_<ffcl::Maps>(m, "Maps", "Feature maps that the pooling kernels read; see goodness.h.")
      .def(py::init(&maps), py::arg("h"), py::arg("samples"), py::arg("channels"), py::arg("positions"),
           py::arg("stride"), py::arg("channels_last"), py::arg("dtype"), py::arg("relu"), py::arg("threads"));
  m.def(
      "goodness_forward",
      [](const ffcl::Activations& h, bool mean, double eps, uintptr_t goodness, uintptr_t out) {
        return ffcl::goodness_forward(h, mean, eps, pointer<float>(goodness), pointer<void>(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "goodness_backward",
      [](const ffcl::Activations& h, bool mean, double eps, uintptr_t goodness, uintptr_t grad_goodness,
         uintptr_t grad_out, uintptr_t dh) {
        return ffcl::goodness_backward(h, mean, eps, pointer<const float>(goodness),
                                       pointer<const float>(grad_goodness), pointer<const void>(grad_out),
                                       pointer<void>(dh));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pair_cosine_forward",
      [](const ffcl::Activations& h1, uintptr_t h2, int64_t h2_stride, uintptr_t target, double margin, double scale,
         uintptr_t loss, uintptr_t coefficients, uintptr_t d1, uintptr_t d2) {
        return ffcl::pair_cosine_forward(h1, pointer<const void>(h2), h2_stride, pointer<const float>(target), margin,
                                         scale, pointer<float>(loss), pointer<float>(coefficients), pointer<void>(d1),
                                         pointer<void>(d2));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pair_cosine_backward",
      [](const ffcl::Activations& h1, uintptr_t h2, int64_t h2_stride, uintptr_t coefficients, uintptr_t grad,
         uintptr_t d1, uintptr_t d2) {
        return ffcl::pair_cosine_backward(h1, pointer<const void>(h2), h2_stride, pointer<const float>(coefficients),
                                          pointer<const float>(grad), pointer<void>(d1), pointer<void>(d2));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pool_goodness_forward",
      [](const ffcl::Maps& h, bool mean, uintptr_t goodness, uintptr_t pooled) {
        return ffcl::pool_goodness_forward(h, mean, pointer<float>(goodness), pointer<float>(pooled));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pool_goodness_backward",
      [](const ffcl::Maps& h, bool mean, uintptr_t pooled, uintptr_t grad_goodness, uintptr_t grad_pooled,
         uintptr_t dh) {
        return ffcl::pool_goodness_backward(h, mean, pointer<const float>(pooled), pointer<const float>(grad_goodness),
                                            pointer<const float>(grad_pooled), pointer<void>(dh));
      },
      py::call_guard<py::gil_scoped_release>());
}
