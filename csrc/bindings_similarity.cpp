// Python entry points of similarity.h.
#include <pybind11/pybind11.h>

#include "bindings_similarity.h"

#include "address.h"

namespace py = pybind11;
using ffcl::pointer;

ffcl::Similarity similarity_of(uintptr_t q, uintptr_t k, int64_t rows, int64_t cols, int64_t dim, int64_t q_stride,
                               int64_t k_stride, int dtype, float scale, uintptr_t row_ids, uintptr_t col_ids,
                               int exclude, int threads) {
  return {pointer<const void>(q),
          pointer<const void>(k),
          rows,
          cols,
          dim,
          q_stride,
          k_stride,
          static_cast<ffcl::DType>(dtype),
          scale,
          pointer<const int64_t>(row_ids),
          pointer<const int64_t>(col_ids),
          static_cast<ffcl::Exclude>(exclude),
          threads};
}

void bind_similarity(py::module_& m) {
  py::class_<ffcl::Similarity>(m, "Similarity", "The arguments that all similarity kernels share; see similarity.h.")
      .def(py::init(&similarity_of), py::arg("q"), py::arg("k"), py::arg("rows"), py::arg("cols"), py::arg("dim"),
           py::arg("q_stride"), py::arg("k_stride"), py::arg("dtype"), py::arg("scale"), py::arg("row_ids"),
           py::arg("col_ids"), py::arg("exclude"), py::arg("threads"));
  m.def(
      "similarity_forward",
      [](const ffcl::Similarity& args, uintptr_t row_lse, uintptr_t col_lse, uintptr_t cache, int64_t cache_size) {
        return ffcl::similarity_forward(args, pointer<float>(row_lse), pointer<float>(col_lse), pointer<float>(cache),
                                        cache_size);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "similarity_backward",
      [](const ffcl::Similarity& args, uintptr_t row_lse, uintptr_t col_lse, uintptr_t row_grad, uintptr_t col_grad,
         uintptr_t cache, int64_t cache_size, uintptr_t dq, uintptr_t dk) {
        return ffcl::similarity_backward(args, pointer<const float>(row_lse), pointer<const float>(col_lse),
                                         pointer<const float>(row_grad), pointer<const float>(col_grad),
                                         pointer<const float>(cache), cache_size, pointer<float>(dq),
                                         pointer<float>(dk));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "siglip",
      [](const ffcl::Similarity& args, float bias, bool positives, uintptr_t loss, uintptr_t dbias, uintptr_t dq,
         uintptr_t dk) {
        return ffcl::siglip(args, bias, positives, pointer<float>(loss), pointer<float>(dbias), pointer<float>(dq),
                            pointer<float>(dk));
      },
      py::call_guard<py::gil_scoped_release>());
}
