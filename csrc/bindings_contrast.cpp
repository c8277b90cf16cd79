// Python entry points of contrast.h.
#include <pybind11/pybind11.h>

#include "address.h"
#include "bindings_similarity.h"
#include "contrast.h"

namespace py = pybind11;
using ffcl::pointer;

namespace {

ffcl::ContrastLoss problem(uintptr_t q, uintptr_t tail, uintptr_t k, uintptr_t positive, int64_t rows, int64_t split,
                           int64_t cols, int64_t dim, int64_t q_stride, int64_t tail_stride, int64_t k_stride,
                           int64_t positive_stride, int dtype, float scale, uintptr_t row_ids, uintptr_t col_ids,
                           int exclude, uintptr_t order, uintptr_t group, bool unit_q, bool unit_k, double eps,
                           bool both, int kind, int threads) {
  ffcl::Similarity pairs =
      similarity_of(q, k, rows, cols, dim, q_stride, k_stride, dtype, scale, row_ids, col_ids, exclude, threads);
  pairs.q_tail = pointer<const void>(tail), pairs.q_split = split, pairs.q_tail_stride = tail_stride;
  return {pairs,
          pointer<const void>(positive),
          positive_stride,
          pointer<const int64_t>(order),
          pointer<const int64_t>(group),
          unit_q,
          unit_k,
          eps,
          both,
          static_cast<ffcl::Contrast>(kind)};
}

}  // namespace

void bind_contrast(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<ffcl::ContrastLoss>(m, "ContrastLoss", "What a contrastive loss is of; see contrast.h.")
      .def(py::init(&problem), py::arg("q"), py::arg("tail"), py::arg("k"), py::arg("positive"), py::arg("rows"),
           py::arg("split"), py::arg("cols"), py::arg("dim"), py::arg("q_stride"), py::arg("tail_stride"),
           py::arg("k_stride"), py::arg("positive_stride"), py::arg("dtype"), py::arg("scale"), py::arg("row_ids"),
           py::arg("col_ids"), py::arg("exclude"), py::arg("order"), py::arg("group"), py::arg("unit_q"),
           py::arg("unit_k"), py::arg("eps"), py::arg("both"), py::arg("kind"), py::arg("threads"));
  m.def(
      "contrast_forward",
      [](const ffcl::ContrastLoss& problem, uintptr_t state, int64_t state_size, uintptr_t count, uintptr_t loss) {
        return ffcl::contrast_forward(problem, pointer<float>(state), state_size, pointer<float>(count),
                                      pointer<float>(loss));
      },
      release);
  m.def(
      "contrast_backward",
      [](const ffcl::ContrastLoss& problem, uintptr_t state, int64_t state_size, uintptr_t count, uintptr_t grad,
         uintptr_t dq, uintptr_t dk, uintptr_t d_positive, uintptr_t d_scale) {
        return ffcl::contrast_backward(problem, pointer<const float>(state), state_size, pointer<const float>(count),
                                       pointer<const float>(grad), pointer<float>(dq), pointer<float>(dk),
                                       pointer<float>(d_positive), pointer<float>(d_scale));
      },
      release);
}
