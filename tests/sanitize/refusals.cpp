// Arguments that no kernel may follow: each is refused with bad_argument before anything is read or written.
#include <functional>

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
    refused(what, ffcl::siglip(s, 0, false, sums.data, sums.data + 1, nullptr, nullptr));
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
  refused("no loss", ffcl::siglip(good, 0, false, nullptr, sums.data, nullptr, nullptr));
  ffcl::Similarity self = good;
  self.k = nullptr;
  refused("dq is missing where k is q", ffcl::similarity_backward(self, z.data, nullptr, z.data, nullptr, nullptr, 0, nullptr, nullptr));
  refused("siglip of q with itself", ffcl::siglip(self, 0, false, sums.data, sums.data + 1, nullptr, nullptr));

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
  return wrong == 0;
}
