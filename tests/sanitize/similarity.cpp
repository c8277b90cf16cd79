// Random problems for similarity.h, with the truth written out in double.
#include "similarity.h"

#include <algorithm>

#include "guarded.h"

using ffcl::Exclude;

namespace {

struct Problem {
  Problem(Random& random, bool large, bool plain) {
    self = !plain && random() % 3 == 0;
    if (large) {  // several panels in each direction, more than one task, columns beyond one block
      rows = pick(random, {97, 389, 577});
      cols = pick(random, {101, 577, 2331});
      dim = pick(random, {5, 12});
    } else {
      rows = pick(random, {1, 2, 5, 6, 7, 12, 13, 31, 96, 97, 130});
      cols = pick(random, {1, 3, 8, 15, 16, 17, 32, 33, 64, 95, 129});
      dim = pick(random, {1, 2, 7, 12, 16, 17, 31, 128, 129, 200, 517});
    }
    if (self) cols = rows;
    dtype = static_cast<ffcl::DType>(random() % 3);
    exclude = plain ? Exclude::none : static_cast<Exclude>(random() % 5);
    threads = static_cast<int>(1 + random() % 4);
    scale = static_cast<float>(pick(random, {2, 14, 14, 14, 60, 100, 300, -7}));
    length = random() % 4 ? 1.0 : 6.0;  // long rows need running maxima
    gap_q = pick(random, {0, 0, 1, 5});
    gap_k = pick(random, {0, 0, 1, 5});
    by_id = exclude != Exclude::none && exclude != Exclude::diagonal;
    std::snprintf(name, sizeof name, "rows %lld cols %lld dim %lld dtype %d exclude %d self %d threads %d scale %g length %g",
                  static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(dim),
                  static_cast<int>(dtype), static_cast<int>(exclude), self, threads, scale, length);
  }
  bool out(const Numbers<int64_t>& row, const Numbers<int64_t>& col, int64_t i, int64_t j) const {
    const int64_t a = by_id ? row[i] : 0, b = by_id ? (self ? row[j] : col[j]) : 0;
    switch (exclude) {
      case Exclude::none: return false;
      case Exclude::diagonal: return i == j;
      case Exclude::same_id: return a == b;
      case Exclude::same_id_off_diagonal: return a == b && i != j;
      default: return a != b;
    }
  }
  bool self, by_id;
  int64_t rows, cols, dim, gap_q, gap_k;
  ffcl::DType dtype;
  Exclude exclude;
  int threads;
  float scale;
  double length;
  char name[200];
};

// rows x inner times (cols x inner)^T, or times inner x cols where `b` is not transposed; plain, for a sanitizer's sake.
std::vector<double> product(const double* a, const double* b, int64_t rows, int64_t cols, int64_t inner, bool transposed) {
  std::vector<double> out(static_cast<size_t>(rows * cols));
  const int64_t step = transposed ? 1 : cols, next = transposed ? inner : 1;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const double *x = a + i * inner, *y = b + j * next;
      double sum = 0;
      for (int64_t d = 0; d < inner; ++d) sum += x[d] * y[d * step];
      out[static_cast<size_t>(i * cols + j)] = sum;
    }
  return out;
}

std::vector<double> dense(const Rows& x) {
  std::vector<double> out;
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t d = 0; d < x.dim; ++d) out.push_back(x.at(i, d));
  return out;
}

std::vector<double> logits(const Problem& p, const Rows& q, const Rows& k) {
  std::vector<double> s = product(dense(q).data(), dense(k).data(), p.rows, p.cols, p.dim, true);
  for (double& x : s) x *= p.scale;
  return s;
}

double lse(const std::vector<double>& s, int64_t first, int64_t n, int64_t step) {
  double largest = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fmax(largest, s[static_cast<size_t>(first + i * step)]);
  if (largest == -INFINITY) return largest;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(s[static_cast<size_t>(first + i * step)] - largest);
  return largest + std::log(sum);
}

// dq = scale G k, dk = scale G^T q against what the kernel wrote; either may be empty. `s`: the logits.
bool near_gradients(const Problem& p, const std::vector<double>& s, const std::vector<double>& g, const Rows& q, const Rows& k, const Numbers<float>& dq,
                    const Numbers<float>& dk) {
  Compare near_q("dq"), near_k("dk");
  // What the terms of a sum come to with random signs, of the largest row and column of G: where they cancel, the error
  // is still theirs.
  std::vector<double> of_row(static_cast<size_t>(p.rows), 0), of_col(static_cast<size_t>(p.cols), 0);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.cols; ++j) {
      const double x = g[static_cast<size_t>(i * p.cols + j)] * p.scale;
      of_row[static_cast<size_t>(i)] += x * x, of_col[static_cast<size_t>(j)] += x * x;
    }
  const double row_size = std::sqrt(std::fmax(1e-40, *std::max_element(of_row.begin(), of_row.end())));
  const double col_size = std::sqrt(std::fmax(1e-40, *std::max_element(of_col.begin(), of_col.end())));
  if (dq.count) {
    const std::vector<double> truth = product(g.data(), dense(k).data(), p.rows, p.dim, p.cols, false);
    for (int64_t i = 0; i < dq.count; ++i) near_q(dq[i], p.scale * truth[static_cast<size_t>(i)]);
  }
  if (dk.count) {
    std::vector<double> turned(g.size());
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t j = 0; j < p.cols; ++j) turned[static_cast<size_t>(j * p.rows + i)] = g[static_cast<size_t>(i * p.cols + j)];
    const std::vector<double> truth = product(turned.data(), dense(q).data(), p.cols, p.dim, p.rows, false);
    for (int64_t i = 0; i < dk.count; ++i) near_k(dk[i], p.scale * truth[static_cast<size_t>(i)]);
  }
  // Products of pairs in bfloat16 round G to it: 2^-8 / sqrt(3) of a term at most, as independent errors, of which a sum
  // may have five times its share. A logit is rounded to 2^-24 of its size, as product and as sum, and that
  // is the relative error of its exponential.
  double logit = 0;
  for (double x : s)
    if (std::isfinite(x)) logit = std::fmax(logit, std::fabs(x));
  const char* isa = ffcl::isa_name(ffcl::current_isa());
  const bool pairs = std::strstr(isa, "bf16") || std::strstr(isa, "amx");
  const double tolerance = (pairs ? 5 * 0x1p-8 / std::sqrt(3.0) : 1e-3) + logit * 0x1p-23;
  const bool a = near_q.near(tolerance, row_size * p.length, p.name), b = near_k.near(tolerance, col_size * p.length, p.name);
  return a && b;
}

}  // namespace

bool check_similarity(Random& random, bool large) {
  const Problem p(random, large, false);
  Rows q(p.dtype, p.rows, p.dim, p.gap_q), other(p.dtype, p.cols, p.dim, p.gap_k);
  q.fill(random, p.length / std::sqrt(static_cast<double>(p.dim)));
  other.fill(random, p.length / std::sqrt(static_cast<double>(p.dim)));
  const Rows& k = p.self ? q : other;
  Numbers<int64_t> row_ids(p.by_id ? p.rows : 0), col_ids(p.by_id && !p.self ? p.cols : 0);
  const int64_t high = random() % 3 ? 0 : int64_t{1} << 40;  // ids beyond 32 bits take another path
  for (int64_t i = 0; i < row_ids.count; ++i) row_ids[i] = static_cast<int64_t>(random() % 4) + high * static_cast<int64_t>(random() % 2);
  for (int64_t i = 0; i < col_ids.count; ++i) col_ids[i] = static_cast<int64_t>(random() % 4) + high * static_cast<int64_t>(random() % 2);
  const ffcl::Similarity args{q.data, p.self ? nullptr : k.data, p.rows, p.cols, p.dim, q.stride, p.self ? 0 : k.stride,
                              p.dtype, p.scale, row_ids.data, col_ids.data, p.exclude, p.threads};

  std::vector<double> s = logits(p, q, k);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.cols; ++j)
      if (p.out(row_ids, col_ids, i, j)) s[static_cast<size_t>(i * p.cols + j)] = -INFINITY;

  const bool both = !p.self && random() % 2;
  const int64_t header = 16 + 2 * (p.rows + (p.self ? 0 : p.cols));
  const int64_t room = (p.rows + 12) * (p.cols + 32);
  Numbers<float> row(p.rows), col(both ? p.cols : 0), cache(pick(random, {0, header, header + room / 3, header + room}));
  if (int status = ffcl::similarity_forward(args, row.data, col.data, cache.data, cache.count)) {
    std::fprintf(stderr, "%s: forward gave %d\n", p.name, status);
    return false;
  }
  Compare near_row("row_lse"), near_col("col_lse");
  std::vector<double> row_truth, col_truth;
  for (int64_t i = 0; i < p.rows; ++i) row_truth.push_back(lse(s, i * p.cols, p.cols, 1)), near_row(row[i], row_truth.back());
  for (int64_t j = 0; j < p.cols; ++j) col_truth.push_back(lse(s, j, p.rows, p.cols));
  for (int64_t j = 0; both && j < p.cols; ++j) near_col(col[j], col_truth[static_cast<size_t>(j)]);
  bool right = near_row.near(2e-5, 1, p.name);
  right = near_col.near(2e-5, 1, p.name) && right;

  // The columns' gradient needs their normalisers.
  const bool need_dk = !p.self && random() % 2, need_dq = p.self || !need_dk || random() % 2;
  Numbers<float> row_grad(p.rows), col_grad(both ? p.cols : 0);
  Numbers<float> dq(need_dq ? p.rows * p.dim : 0), dk(need_dk ? p.cols * p.dim : 0);
  row_grad.fill(random), col_grad.fill(random);
  const bool with_cache = cache.count && random() % 4;
  if (int status = ffcl::similarity_backward(args, row.data, col.data, row_grad.data, col_grad.data,
                                             with_cache ? cache.data : nullptr, with_cache ? cache.count : 0, dq.data, dk.data)) {
    std::fprintf(stderr, "%s: backward gave %d\n", p.name, status);
    return false;
  }
  std::vector<double> g(s.size());
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.cols; ++j) {
      const size_t at = static_cast<size_t>(i * p.cols + j);
      if (s[at] == -INFINITY) continue;
      g[at] = row_grad[i] * std::exp(s[at] - row_truth[static_cast<size_t>(i)]);
      if (p.self) g[at] += row_grad[j] * std::exp(s[at] - row_truth[static_cast<size_t>(j)]);
      if (both) g[at] += col_grad[j] * std::exp(s[at] - col_truth[static_cast<size_t>(j)]);
    }
  return near_gradients(p, s, g, q, k, dq, dk) && right;
}

bool check_siglip(Random& random, bool large) {
  Problem p(random, large, true);
  const bool positives = random() % 2, gradients = random() % 3;
  if (positives) p.cols = p.rows;
  Rows q(p.dtype, p.rows, p.dim, p.gap_q), k(p.dtype, p.cols, p.dim, p.gap_k);
  q.fill(random, p.length / std::sqrt(static_cast<double>(p.dim)));
  k.fill(random, p.length / std::sqrt(static_cast<double>(p.dim)));
  const float bias = static_cast<float>(pick(random, {-10, 0, 3}));
  const ffcl::Similarity args{q.data, k.data, p.rows, p.cols, p.dim, q.stride, k.stride, p.dtype, p.scale,
                              nullptr, nullptr, Exclude::none, p.threads};
  Numbers<float> dq(gradients ? p.rows * p.dim : 0), dk(gradients ? p.cols * p.dim : 0);
  Numbers<float> loss(1), dbias(1);
  if (int status = ffcl::siglip(args, bias, positives, loss.data, dbias.data, dq.data, dk.data)) {
    std::fprintf(stderr, "siglip %s: gave %d\n", p.name, status);
    return false;
  }
  const std::vector<double> s = logits(p, q, k);
  std::vector<double> g(s.size());
  double truth = 0, bias_truth = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.cols; ++j) {
      const size_t at = static_cast<size_t>(i * p.cols + j);
      const double z = positives && i == j ? 1 : -1, x = -z * (s[at] + bias);
      truth += std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
      g[at] = -z / (1 + std::exp(-x));
      bias_truth += g[at];
    }
  Compare near_loss("loss"), near_bias("dbias");
  near_loss(loss[0], truth), near_bias(dbias[0], bias_truth);
  bool right = near_loss.near(1e-4, 1e-3, p.name);
  right = near_bias.near(1e-4, static_cast<double>(p.rows), p.name) && right;
  return near_gradients(p, s, g, q, k, dq, dk) && right;
}
