// Python entry points of similarity_cuda.h and, for tests, of the arithmetic in similarity_plan.h and cuda_plan.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "address.h"
#include "similarity_cuda.h"
#include "similarity_plan.h"

namespace py = pybind11;
using ffcl::pointer;

namespace {

ffcl::SimilarityCuda problem(uintptr_t q, uintptr_t k, int64_t rows, int64_t cols, int64_t dim, int64_t q_stride,
                             int64_t k_stride, int dtype, uintptr_t scale, uintptr_t row_ids, uintptr_t col_ids,
                             int exclude, bool triangle, int way, int device, uintptr_t stream) {
  return {pointer<const void>(q),
          pointer<const void>(k),
          rows,
          cols,
          dim,
          q_stride,
          k_stride,
          static_cast<ffcl::DType>(dtype),
          pointer<const float>(scale),
          pointer<const int64_t>(row_ids),
          pointer<const int64_t>(col_ids),
          exclude,
          triangle,
          static_cast<ffcl::SimilarityWay>(way),
          device,
          pointer<void>(stream)};
}

// lse, rests, grad, n, vectors
using Side = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t>;

ffcl::Normalisers normalisers(const Side& side) {
  const auto [lse, rests, grad, n, vectors] = side;
  return {pointer<const float>(lse), pointer<const float>(rests), pointer<const float>(grad), n,
          pointer<float>(vectors)};
}

}  // namespace

void bind_similarity_cuda(py::module_& m) {
  py::class_<ffcl::SimilarityCuda>(m, "SimilarityCuda", py::module_local(),
                                   "The arguments of the similarity kernels; see similarity_cuda.h.")
      .def(py::init(&problem), py::arg("q"), py::arg("k"), py::arg("rows"), py::arg("cols"), py::arg("dim"),
           py::arg("q_stride"), py::arg("k_stride"), py::arg("dtype"), py::arg("scale"), py::arg("row_ids"),
           py::arg("col_ids"), py::arg("exclude"), py::arg("triangle"), py::arg("way"), py::arg("device"),
           py::arg("stream"));
  m.def("sm90_built", &ffcl::sm90_built, "Whether the similarity kernels for compute capability 9.0 were compiled in.");
  m.def("similarity_workspace_cuda", &ffcl::similarity_workspace_cuda);
  m.def(
      "similarity_forward_cuda",
      [](const ffcl::SimilarityCuda& s, uintptr_t row_lse, uintptr_t col_lse, uintptr_t rests, uintptr_t workspace,
         int64_t size) {
        return ffcl::similarity_forward_cuda(s, pointer<float>(row_lse), pointer<float>(col_lse), pointer<float>(rests),
                                             pointer<float>(workspace), size);
      },
      py::call_guard<py::gil_scoped_release>());
  m.attr("VECTOR_RANGES") = ffcl::VECTOR_RANGES;
  m.def(
      "similarity_vectors_cuda",
      [](const Side& rows, const Side& cols, uintptr_t scale, double gain, uintptr_t ranges, uintptr_t frame,
         int device, uintptr_t stream) {
        return ffcl::similarity_vectors_cuda(normalisers(rows), normalisers(cols), pointer<const float>(scale), gain,
                                             pointer<float>(ranges), pointer<float>(frame), device,
                                             pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "similarity_panel_cuda",
      [](const ffcl::SimilarityCuda& s, uintptr_t row_vectors, uintptr_t col_vectors, uintptr_t frame,
         int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end, uintptr_t panel,
         int64_t panel_stride) {
        return ffcl::similarity_panel_cuda(s, pointer<const float>(row_vectors), pointer<const float>(col_vectors),
                                           pointer<const float>(frame), row_begin, row_end, col_begin, col_end,
                                           pointer<void>(panel), panel_stride);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sums_plan",
      [](int rows, int cols, bool triangle, bool cluster, int processors) {
        const ffcl::SumsPlan p = ffcl::plan_sums(rows, cols, triangle, cluster, processors);
        py::dict d;
        d["span"] = p.span;
        d["side"] = p.side;
        d["supers"] = p.supers;
        d["chunk"] = p.chunk;
        d["workspace"] = ffcl::sums_workspace(p, cols);
        return d;
      },
      "How the sums of a problem are cut.");
  m.def(
      "sums_cells",
      [](int rows, int cols, bool triangle, bool cluster, int processors, int begin, int end) {
        const ffcl::SumsPlan p = ffcl::plan_sums(rows, cols, triangle, cluster, processors);
        std::vector<std::pair<int, int>> cells;
        for (int64_t i = 0; i < ffcl::sums_clusters(p, begin, end); ++i) {
          const ffcl::Cell c = ffcl::super_of(p, i, begin, end);
          cells.emplace_back(c.row, c.col);
        }
        return cells;
      },
      "The super-tile of each cluster of a chunk.");
  m.def(
      "sums_slots",
      [](int rows, int cols, bool triangle, bool cluster, int processors, bool is_col, int index, int begin, int end) {
        const ffcl::SumsPlan p = ffcl::plan_sums(rows, cols, triangle, cluster, processors);
        const ffcl::Slots s = ffcl::slots_of(p, is_col, index, begin, end);
        return std::make_tuple(s.first_row, s.last_row, s.last_col);
      },
      "(first, last) slots of row sums and the last of column sums that make up a normaliser.");
  m.def(
      "pair_plan",
      [](int64_t rows, int packs, int pack_bytes, bool gradients, int capability, int shared) {
        const ffcl::PairPlan p = ffcl::plan_pair(rows, packs, pack_bytes, gradients, {capability, 132, shared});
        return std::make_tuple(p.lanes, p.cluster, p.share, p.kept, p.grid.blocks, p.grid.shared);
      },
      "(lanes, cluster, share, kept, blocks, shared bytes) of the pair cosine.");
  m.def(
      "pool_plan",
      [](int64_t samples, int channels, int positions, bool last, int wide, bool aligned, int processors) {
        const ffcl::PoolPlan p = ffcl::plan_pool(samples, channels, positions, last, wide, aligned, processors);
        return std::make_tuple(static_cast<int>(p.way), p.pack, p.parts, p.across, p.grid.blocks, p.grid.shared);
      },
      "(way, pack, parts, across, blocks, shared bytes) of the pooling.");
}
