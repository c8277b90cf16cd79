// Arguments that no kernel may follow: each is refused with bad_argument before anything is read or written.
#include <functional>

#include "contrast.h"
#include "goodness.h"
#include "guarded.h"
#include "similarity.h"

bool check_refusals() {
  Numbers<float> x(64), y(64), z(64);
  Numbers<double> sums(2);
  Numbers<int64_t> ids(4);
  const ffcl::Similarity good{x.data, y.data, 4, 4, 4, 4, 4, ffcl::DType::float32, 1, nullptr, nullptr, ffcl::Exclude::none, 1};
  int wrong = 0;
  const auto refused = [&](const char* what, int status) {
    if (status == ffcl::bad_argument) return;
    std::fprintf(stderr, "%s: status %d, not bad_argument\n", what, status);
    ++wrong;
  };
  const auto similarity = [&](const char* what, const std::function<void(ffcl::Similarity&)>& change) {
    ffcl::Similarity s = good;
    change(s);
    refused(what, ffcl::similarity_forward(s, z.data, nullptr, nullptr, 0));
    refused(what, ffcl::similarity_backward(s, z.data, nullptr, z.data, nullptr, nullptr, 0, z.data, nullptr));
    refused(what, ffcl::siglip(s, 0, false, z.data, z.data + 1, nullptr, nullptr));
  };
  similarity("no q", [](auto& s) { s.q = nullptr; });
  similarity("no rows", [](auto& s) { s.rows = 0; });
  similarity("negative cols", [](auto& s) { s.cols = -4; });
  similarity("negative dim", [](auto& s) { s.dim = -1; });
  similarity("a product beyond 64 bits", [](auto& s) { s.rows = s.dim = int64_t{1} << 40; });
  similarity("rows that overlap the end of memory", [](auto& s) { s.q_stride = int64_t{1} << 62; });
  similarity("a dtype that does not exist", [](auto& s) { s.dtype = static_cast<ffcl::DType>(9); });
  similarity("an exclusion that does not exist", [](auto& s) { s.exclude = static_cast<ffcl::Exclude>(5); });
  similarity("ids that are missing", [](auto& s) { s.exclude = ffcl::Exclude::same_id; });
  similarity("ids of one side only", [&](auto& s) { s.exclude = ffcl::Exclude::same_id, s.row_ids = ids.data; });
  refused("no row_lse", ffcl::similarity_forward(good, nullptr, nullptr, nullptr, 0));
  refused("a cache too small", ffcl::similarity_forward(good, z.data, nullptr, x.data, 16 + 2 * 8 - 1));
  refused("a cache too small", ffcl::similarity_backward(good, z.data, nullptr, z.data, nullptr, x.data, 31, z.data, nullptr));
  refused("no row_grad", ffcl::similarity_backward(good, z.data, nullptr, nullptr, nullptr, nullptr, 0, z.data, nullptr));
  refused("column gradients without normalisers",
          ffcl::similarity_backward(good, z.data, nullptr, z.data, z.data, nullptr, 0, z.data, nullptr));
  refused("no loss", ffcl::siglip(good, 0, false, nullptr, z.data, nullptr, nullptr));
  ffcl::Similarity self = good;
  self.k = nullptr;
  refused("dq is missing where k is q", ffcl::similarity_backward(self, z.data, nullptr, z.data, nullptr, nullptr, 0, nullptr, nullptr));
  refused("siglip of q with itself", ffcl::siglip(self, 0, false, z.data, z.data + 1, nullptr, nullptr));

  const ffcl::Activations rows{x.data, 4, 4, 4, ffcl::DType::float32, false, 1};
  const auto goodness = [&](const char* what, const std::function<void(ffcl::Activations&)>& change) {
    ffcl::Activations a = rows;
    change(a);
    refused(what, ffcl::goodness_forward(a, false, 0, z.data, nullptr));
    refused(what, ffcl::goodness_backward(a, false, 0, z.data, z.data, nullptr, y.data));
    refused(what, ffcl::pair_cosine_forward(a, y.data, 4, z.data, 0, 1, z.data, z.data, nullptr, nullptr));
    refused(what, ffcl::pair_cosine_backward(a, y.data, 4, z.data, z.data, y.data, nullptr));
  };
  goodness("no h", [](auto& a) { a.h = nullptr; });
  goodness("no rows", [](auto& a) { a.rows = 0; });
  goodness("negative dim", [](auto& a) { a.dim = -3; });
  goodness("a product beyond 64 bits", [](auto& a) { a.rows = a.dim = int64_t{1} << 40; });
  goodness("a dtype that does not exist", [](auto& a) { a.dtype = static_cast<ffcl::DType>(-1); });
  refused("no goodness", ffcl::goodness_forward(rows, false, 0, nullptr, nullptr));
  refused("no dh", ffcl::goodness_backward(rows, false, 0, z.data, z.data, nullptr, nullptr));
  refused("no h2", ffcl::pair_cosine_forward(rows, nullptr, 4, z.data, 0, 1, z.data, z.data, nullptr, nullptr));
  const ffcl::Maps maps{x.data, 2, 4, 4, 16, false, ffcl::DType::float32, false, 1};
  const auto pool = [&](const char* what, const std::function<void(ffcl::Maps&)>& change) {
    ffcl::Maps m = maps;
    change(m);
    refused(what, ffcl::pool_goodness_forward(m, false, z.data, y.data));
    refused(what, ffcl::pool_goodness_backward(m, false, z.data, z.data, nullptr, y.data));
  };
  pool("no h", [](auto& m) { m.h = nullptr; });
  pool("no channels", [](auto& m) { m.channels = 0; });
  pool("negative positions", [](auto& m) { m.positions = -1; });
  pool("a product beyond 64 bits", [](auto& m) { m.samples = m.positions = int64_t{1} << 40; });
  pool("a dtype that does not exist", [](auto& m) { m.dtype = static_cast<ffcl::DType>(3); });

  const ffcl::Rows views{x.data, 4, 4, 4, ffcl::DType::float32, y.data, 2, 4};
  const auto by_row = [&](const char* what, const std::function<void(ffcl::Rows&)>& change) {
    ffcl::Rows r = views;
    change(r);
    refused(what, ffcl::row_norms(r, 0, 1, z.data));
    refused(what, ffcl::row_dots(r, views, 1, sums.data));
    refused(what, ffcl::row_dots(views, r, 1, sums.data));
    refused(what, ffcl::add_weighted_rows(r, z.data, 1, z.data));
    refused(what, ffcl::class_dots(r, ids.data, ids.data, 1, sums.data));
    refused(what, ffcl::add_class_gradient(r, ids.data, ids.data, z.data, 1, z.data));
    refused(what, ffcl::finish_gradient(r, 0, 1, z.data, sums.data));
    ffcl::Similarity s{r.x, nullptr, r.rows, r.rows, r.dim, r.stride, 0, r.dtype, 1, nullptr, nullptr, ffcl::Exclude::none, 1};
    s.q_tail = r.tail, s.q_split = r.split, s.q_tail_stride = r.tail_stride;
    refused(what, ffcl::similarity_forward(s, z.data, nullptr, nullptr, 0));
  };
  by_row("no rows of x", [](auto& r) { r.x = nullptr; });
  by_row("no dim", [](auto& r) { r.dim = 0; });
  by_row("a product beyond 64 bits", [](auto& r) { r.rows = r.dim = int64_t{1} << 40; });
  by_row("a tail that begins before the first row", [](auto& r) { r.split = 0; });
  by_row("a tail that begins after the last row", [](auto& r) { r.split = 5; });
  by_row("a tail beyond the end of memory", [](auto& r) { r.tail_stride = int64_t{1} << 62; });
  by_row("a dtype that does not exist", [](auto& r) { r.dtype = static_cast<ffcl::DType>(7); });
  ffcl::Rows short_of = views;
  short_of.rows = 3;
  refused("fewer positives than rows", ffcl::row_dots(views, short_of, 1, sums.data));
  refused("no classes", ffcl::class_ids(4, nullptr, ids.data, ids.data, z.data));
  refused("a negative number of losses", ffcl::contrast_losses(-1, x.data, sums.data, nullptr, 1, ffcl::Contrast::softplus, false, y.data, z.data));
  refused("a mean of no count", ffcl::contrast_losses(2, x.data, sums.data, nullptr, 1, ffcl::Contrast::mean, false, y.data, z.data));
  refused("no weight", ffcl::contrast_weights(2, x.data, y.data, nullptr, nullptr, 1, z.data, nullptr, nullptr));

  // Of 4 rows against 4 columns: 8 norms, 16 normalisers and slopes, in two lines.
  const ffcl::ContrastLoss contrast{good, nullptr, 4, nullptr, nullptr, true, true, 0, true, ffcl::Contrast::softplus};
  const auto loss = [&](const char* what, const std::function<void(ffcl::ContrastLoss&)>& change, float* count = nullptr) {
    ffcl::ContrastLoss c = contrast;
    change(c);
    refused(what, ffcl::contrast_forward(c, z.data, 32, count, y.data));
    refused(what, ffcl::contrast_backward(c, z.data, 32, count, y.data, x.data, nullptr, nullptr, nullptr));
  };
  loss("no q", [](auto& c) { c.pairs.q = nullptr; });
  loss("a product beyond 64 bits", [](auto& c) { c.pairs.rows = c.pairs.cols = c.pairs.dim = int64_t{1} << 40; });
  loss("norms of another's", [&](auto& c) { c.pairs.q_norm = z.data; });
  loss("a kind that does not exist", [](auto& c) { c.kind = static_cast<ffcl::Contrast>(3); });
  loss("columns' losses of fewer columns", [](auto& c) { c.pairs.cols = 3; });
  loss("fewer positives than rows", [](auto& c) { c.both = false, c.pairs.cols = 3; });
  loss("positives without a stride", [&](auto& c) { c.positive = x.data, c.positive_stride = -1; });
  loss("no positives", [](auto& c) { c.both = false, c.pairs.k = nullptr; });
  loss("classes and keys", [&](auto& c) { c.both = false, c.order = c.group = ids.data; });
  loss("half of the classes", [&](auto& c) { c.both = false, c.pairs.k = nullptr, c.order = ids.data; });
  loss("a mean without classes", [](auto& c) { c.both = false, c.kind = ffcl::Contrast::mean; }, z.data + 40);
  loss("a mean without a count", [&](auto& c) {
    c.both = false, c.pairs.k = nullptr, c.pairs.exclude = ffcl::Exclude::same_id, c.order = c.group = ids.data, c.kind = ffcl::Contrast::mean;
  });
  loss("a count without a mean", [](auto&) {}, z.data + 40);
  refused("a state too small", ffcl::contrast_forward(contrast, z.data, 31, nullptr, y.data));
  refused("a state too small", ffcl::contrast_backward(contrast, z.data, 31, nullptr, y.data, x.data, nullptr, nullptr, nullptr));
  refused("a cache too small", ffcl::contrast_forward(contrast, z.data, 32 + 16, nullptr, y.data));
  refused("no state", ffcl::contrast_forward(contrast, nullptr, 32, nullptr, y.data));
  refused("no losses", ffcl::contrast_forward(contrast, z.data, 32, nullptr, nullptr));
  refused("no gradient", ffcl::contrast_backward(contrast, z.data, 32, nullptr, nullptr, x.data, nullptr, nullptr, nullptr));
  refused("dscale without dq", ffcl::contrast_backward(contrast, z.data, 32, nullptr, y.data, nullptr, x.data, nullptr, z.data));
  refused("the gradient of no positives", ffcl::contrast_backward(contrast, z.data, 32, nullptr, y.data, x.data, nullptr, x.data, nullptr));
  return wrong == 0;
}
