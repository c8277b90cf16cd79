// Python entry points of rows.h.
#include <pybind11/pybind11.h>

#include "address.h"
#include "rows.h"

namespace py = pybind11;
using ffcl::pointer;

namespace {

ffcl::Rows rows(uintptr_t x, int64_t rows, int64_t dim, int64_t stride, int dtype, uintptr_t tail, int64_t split,
                int64_t tail_stride, uintptr_t norm) {
  return {pointer<const void>(x),
          rows,
          dim,
          stride,
          static_cast<ffcl::DType>(dtype),
          pointer<const void>(tail),
          split,
          tail_stride,
          pointer<const float>(norm)};
}

}  // namespace

void bind_rows(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<ffcl::Rows>(m, "Rows", "Rows in one or two tensors, perhaps meant divided by their norms; see rows.h.")
      .def(py::init(&rows), py::arg("x"), py::arg("rows"), py::arg("dim"), py::arg("stride"), py::arg("dtype"),
           py::arg("tail") = 0, py::arg("split") = 0, py::arg("tail_stride") = 0, py::arg("norm") = 0);
  m.def(
      "row_norms",
      [](const ffcl::Rows& x, double eps, int threads, uintptr_t norm) {
        return ffcl::row_norms(x, eps, threads, pointer<float>(norm));
      },
      release);
  m.def(
      "row_dots",
      [](const ffcl::Rows& a, const ffcl::Rows& b, int threads, uintptr_t dot) {
        return ffcl::row_dots(a, b, threads, pointer<double>(dot));
      },
      release);
  m.def(
      "add_weighted_rows",
      [](const ffcl::Rows& z, uintptr_t weight, int threads, uintptr_t grad) {
        return ffcl::add_weighted_rows(z, pointer<const float>(weight), threads, pointer<float>(grad));
      },
      release);
  m.def(
      "class_dots",
      [](const ffcl::Rows& z, uintptr_t order, uintptr_t group, int threads, uintptr_t dot) {
        return ffcl::class_dots(z, pointer<const int64_t>(order), pointer<const int64_t>(group), threads,
                                pointer<double>(dot));
      },
      release);
  m.def(
      "add_class_gradient",
      [](const ffcl::Rows& z, uintptr_t order, uintptr_t group, uintptr_t weight, int threads, uintptr_t grad) {
        return ffcl::add_class_gradient(z, pointer<const int64_t>(order), pointer<const int64_t>(group),
                                        pointer<const float>(weight), threads, pointer<float>(grad));
      },
      release);
  m.def(
      "finish_gradient",
      [](const ffcl::Rows& z, double eps, int threads, uintptr_t grad, uintptr_t inner) {
        return ffcl::finish_gradient(z, eps, threads, pointer<float>(grad), pointer<double>(inner));
      },
      release);
  m.def(
      "class_ids",
      [](int64_t n, uintptr_t order, uintptr_t group, uintptr_t ids, uintptr_t count) {
        return ffcl::class_ids(n, pointer<const int64_t>(order), pointer<const int64_t>(group), pointer<int64_t>(ids),
                               pointer<float>(count));
      },
      release);
  m.def(
      "contrast_losses",
      [](int64_t n, uintptr_t lse, uintptr_t dot, uintptr_t count, double scale, int kind, bool add, uintptr_t loss,
         uintptr_t slope) {
        return ffcl::contrast_losses(n, pointer<const float>(lse), pointer<const double>(dot),
                                     pointer<const float>(count), scale, static_cast<ffcl::Contrast>(kind), add,
                                     pointer<float>(loss), pointer<float>(slope));
      },
      release);
  m.def(
      "contrast_weights",
      [](int64_t n, uintptr_t grad, uintptr_t slope, uintptr_t col_slope, uintptr_t count, double scale,
         uintptr_t row_grad, uintptr_t col_grad, uintptr_t weight) {
        return ffcl::contrast_weights(n, pointer<const float>(grad), pointer<const float>(slope),
                                      pointer<const float>(col_slope), pointer<const float>(count), scale,
                                      pointer<float>(row_grad), pointer<float>(col_grad), pointer<float>(weight));
      },
      release);
}
