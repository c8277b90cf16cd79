// Python entry points of goodness_cuda.h; compiled only with the CUDA kernels. Addresses are Tensor.data_ptr(), the
// stream is torch.cuda.Stream.cuda_stream; 0 stands for "none".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "address.h"
#include "goodness_cuda.h"

namespace py = pybind11;
using ffcl::pointer;

namespace {

ffcl::GoodnessRows rows(uintptr_t h, int64_t rows, int64_t dim, int64_t stride, int dtype, bool relu, bool mean,
                        float eps, int device, uintptr_t stream) {
  return {pointer<const void>(h), rows, dim, stride, static_cast<ffcl::DType>(dtype), relu, mean, eps, device,
          pointer<void>(stream)};
}

// (h, dh or 0, rows, dim, stride, first_row) of each layer.
using Layer = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

ffcl::GoodnessMany many(const std::vector<Layer>& layers, int dtype, bool relu, bool mean, int device,
                        uintptr_t stream) {
  ffcl::GoodnessMany g{{}, static_cast<ffcl::DType>(dtype), relu, mean, device, pointer<void>(stream)};
  if (layers.size() > ffcl::MANY_LAYERS) throw py::value_error("too many layers for one launch");
  for (const auto& [h, dh, rows, dim, stride, first_row] : layers) {
    if (dim > INT32_MAX / 2) throw py::value_error("a layer is too wide");
    auto& to = g.layers.layer[g.layers.count++];
    to.h = pointer<const void>(h);
    to.dh = pointer<void>(dh);
    to.rows = rows;
    to.stride = stride;
    to.first_row = first_row;
    to.dim = static_cast<int>(dim);
  }
  return g;
}

ffcl::PairRows pair(uintptr_t h1, uintptr_t h2, int64_t rows, int64_t dim, int64_t stride_1, int64_t stride_2,
                    int dtype, bool relu, int device, uintptr_t stream) {
  return {pointer<const void>(h1),
          pointer<const void>(h2),
          rows,
          dim,
          stride_1,
          stride_2,
          static_cast<ffcl::DType>(dtype),
          relu,
          device,
          pointer<void>(stream)};
}

ffcl::PoolMaps maps(uintptr_t h, int64_t samples, int64_t channels, int64_t positions, int64_t stride,
                    bool channels_last, int dtype, bool relu, bool mean, int device, uintptr_t stream) {
  return {pointer<const void>(h),
          samples,
          channels,
          positions,
          stride,
          channels_last,
          static_cast<ffcl::DType>(dtype),
          relu,
          mean,
          device,
          pointer<void>(stream)};
}

}  // namespace

void bind_goodness_cuda(py::module_& m) {
  py::class_<ffcl::GoodnessRows>(m, "GoodnessRows", py::module_local(),
                                 "The arguments that both kernels share; see goodness_cuda.h.")
      .def(py::init(&rows), py::arg("h"), py::arg("rows"), py::arg("dim"), py::arg("stride"), py::arg("dtype"),
           py::arg("relu"), py::arg("mean"), py::arg("eps"), py::arg("device"), py::arg("stream"));
  m.def(
      "goodness_forward_cuda",
      [](const ffcl::GoodnessRows& args, uintptr_t goodness, uintptr_t out) {
        return ffcl::goodness_forward_cuda(args, pointer<float>(goodness), pointer<void>(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "goodness_backward_cuda",
      [](const ffcl::GoodnessRows& args, uintptr_t goodness, uintptr_t grad_goodness, uintptr_t grad_out,
         uintptr_t dh) {
        return ffcl::goodness_backward_cuda(args, pointer<const float>(goodness), pointer<const float>(grad_goodness),
                                            pointer<const void>(grad_out), pointer<void>(dh));
      },
      py::call_guard<py::gil_scoped_release>());
  m.attr("MANY_LAYERS") = ffcl::MANY_LAYERS;
  py::class_<ffcl::GoodnessMany>(m, "GoodnessMany", py::module_local(), "Layers of one launch; see goodness_cuda.h.")
      .def(py::init(&many), py::arg("layers"), py::arg("dtype"), py::arg("relu"), py::arg("mean"), py::arg("device"),
           py::arg("stream"));
  m.def(
      "goodness_many_cuda",
      [](const ffcl::GoodnessMany& g, uintptr_t goodness) {
        return ffcl::goodness_many_cuda(g, pointer<float>(goodness));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "goodness_many_backward_cuda",
      [](const ffcl::GoodnessMany& g, uintptr_t grad_goodness) {
        return ffcl::goodness_many_backward_cuda(g, pointer<const float>(grad_goodness));
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<ffcl::PairRows>(m, "PairRows", py::module_local(),
                             "The arguments of the pair cosine kernels; see goodness_cuda.h.")
      .def(py::init(&pair), py::arg("h1"), py::arg("h2"), py::arg("rows"), py::arg("dim"), py::arg("stride_1"),
           py::arg("stride_2"), py::arg("dtype"), py::arg("relu"), py::arg("device"), py::arg("stream"));
  m.def(
      "pair_cosine_forward_cuda",
      [](const ffcl::PairRows& g, uintptr_t target, float margin, float scale, uintptr_t loss, uintptr_t coefficients,
         uintptr_t d1, uintptr_t d2) {
        return ffcl::pair_cosine_forward_cuda(g, pointer<const float>(target), margin, scale, pointer<float>(loss),
                                              pointer<float>(coefficients), pointer<void>(d1), pointer<void>(d2));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pair_cosine_backward_cuda",
      [](const ffcl::PairRows& g, uintptr_t coefficients, uintptr_t grad, uintptr_t d1, uintptr_t d2) {
        return ffcl::pair_cosine_backward_cuda(g, pointer<const float>(coefficients), pointer<const float>(grad),
                                               pointer<void>(d1), pointer<void>(d2));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "scale_cuda",
      [](uintptr_t x, int64_t size, int dtype, uintptr_t factor, int device, uintptr_t stream) {
        return ffcl::scale_cuda(pointer<void>(x), size, static_cast<ffcl::DType>(dtype), pointer<const float>(factor),
                                device, pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<ffcl::PoolMaps>(m, "PoolMaps", py::module_local(),
                             "The arguments of the pooling kernels; see goodness_cuda.h.")
      .def(py::init(&maps), py::arg("h"), py::arg("samples"), py::arg("channels"), py::arg("positions"),
           py::arg("stride"), py::arg("channels_last"), py::arg("dtype"), py::arg("relu"), py::arg("mean"),
           py::arg("device"), py::arg("stream"));
  m.def(
      "pool_goodness_forward_cuda",
      [](const ffcl::PoolMaps& g, uintptr_t goodness, uintptr_t pooled) {
        return ffcl::pool_goodness_forward_cuda(g, pointer<float>(goodness), pointer<float>(pooled));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pool_goodness_backward_cuda",
      [](const ffcl::PoolMaps& g, uintptr_t pooled, uintptr_t grad_goodness, uintptr_t grad_pooled, uintptr_t dh) {
        return ffcl::pool_goodness_backward_cuda(g, pointer<const float>(pooled), pointer<const float>(grad_goodness),
                                                 pointer<const float>(grad_pooled), pointer<void>(dh));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("cuda_error", &ffcl::cuda_error, py::arg("status"), "CUDA's words for a status of one of these kernels.");
}
