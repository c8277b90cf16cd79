// Random problems for contrast.h, with the loss written out in double; gradients are compared with its differences
// along a random direction, and by the Python tests with the reference.
#include "contrast.h"

#include <algorithm>
#include <numeric>

#include "guarded.h"

namespace {

using Matrix = std::vector<std::vector<double>>;

// A loss's operands in double, and what it comes to.
struct Truth {
  Matrix q, k, positive;
  std::vector<int64_t> label;  // of each row, for classes
  bool unit_q, unit_k, both, classes;
  ffcl::Contrast kind;
  double scale;

  static Matrix divided(Matrix x, bool unit) {
    for (auto& row : x) {
      double squares = 0;
      for (double v : row) squares += v * v;
      for (double& v : row) v /= unit ? std::fmax(std::sqrt(squares), 1e-12) : 1;
    }
    return x;
  }
  static double dot(const std::vector<double>& x, const std::vector<double>& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  }
  double of(double lse, double logit, int64_t count) const {
    if (count == 0) return 0;
    const double x = lse - logit / static_cast<double>(count);
    const bool soft = kind == ffcl::Contrast::softplus || (kind == ffcl::Contrast::mean && count == 1);
    if (!soft) return x == -INFINITY ? 0 : x;
    return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
  }
  std::vector<double> losses() const {
    const Matrix z = divided(q, unit_q), zk = classes ? z : divided(k, unit_k), zp = divided(positive, unit_q);
    const size_t n = z.size(), m = zk.size();
    Matrix s(n, std::vector<double>(m));
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < m; ++j) s[i][j] = scale * dot(z[i], zk[j]);
    std::vector<double> loss(n);
    for (size_t i = 0; i < n; ++i) {
      int64_t count = classes ? std::count(label.begin(), label.end(), label[i]) - 1 : 1;
      double logit = 0;
      for (size_t j = 0; classes && j < n; ++j) logit += j != i && label[j] == label[i] ? s[i][j] : 0;
      if (!classes) logit = positive.empty() ? s[i][i] : scale * dot(z[i], zp[i]);
      const auto out = [&](size_t a, size_t b) {  // by classes: one's own, and a lone positive; else the positive in k
        return classes ? a == b || (label[a] == label[b] && std::count(label.begin(), label.end(), label[a]) == 2) : positive.empty() && a == b;
      };
      const auto lse = [&](auto&& at, size_t terms, auto&& left_out) {
        double sum = 0;
        for (size_t j = 0; j < terms; ++j) sum += left_out(j) ? 0 : std::exp(at(j));
        return std::log(sum);
      };
      loss[i] = of(lse([&](size_t j) { return s[i][j]; }, m, [&](size_t j) { return out(i, j); }), logit, count);
      if (both) loss[i] += of(lse([&](size_t j) { return s[j][i]; }, n, [&](size_t j) { return out(j, i); }), logit, count);
    }
    return loss;
  }
};

Matrix dense(const Rows& x) {
  Matrix out;
  for (int64_t i = 0; i < x.rows; ++i) {
    out.emplace_back();
    for (int64_t d = 0; d < x.dim; ++d) out.back().push_back(x.at(i, d));
  }
  return out;
}

// Rows much longer than the step of the differences: a row divided by its length has no derivative at zero, which a
// float16 of one element in 20,000 is. (The Python tests have rows of zeros.)
void fill_away_from_zero(Random& random, Rows& x) {
  std::normal_distribution<double> normal(0, 1 / std::sqrt(static_cast<double>(x.dim)));
  for (int64_t i = 0; i < x.rows; ++i)
    for (double squares = 0; squares < 1e-4;) {
      squares = 0;
      for (int64_t d = 0; d < x.dim; ++d) x.set(i, d, normal(random)), squares += x.at(i, d) * x.at(i, d);
    }
}

}  // namespace

bool check_contrast(Random& random, bool large) {
  const int64_t rows = large ? pick(random, {97, 130}) : pick(random, {2, 3, 7, 33});
  const int64_t dim = large ? pick(random, {33, 65}) : pick(random, {1, 5, 17});
  const auto dtype = static_cast<ffcl::DType>(random() % 3);
  const bool classes = random() % 3 == 0, given = !classes && random() % 2, both = !classes && !given && random() % 2;
  const bool two = random() % 2, unit_q = random() % 2, unit_k = random() % 2;
  const int64_t cols = classes ? rows : given ? rows + pick(random, {0, 4}) : rows, split = two ? 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(rows - 1)) : rows;
  const auto kind = classes ? ffcl::Contrast::mean : static_cast<ffcl::Contrast>(random() % 2);
  Rows q(dtype, split, dim, pick(random, {0, 3})), tail(dtype, std::max<int64_t>(1, rows - split), dim, pick(random, {0, 1}));
  Rows k(dtype, cols, dim, pick(random, {0, 2})), positive(dtype, rows, dim, pick(random, {0, 5}));
  for (Rows* x : {&q, &tail, &k, &positive}) fill_away_from_zero(random, *x);

  Truth truth{dense(q), classes ? Matrix() : dense(k), given ? dense(positive) : Matrix(), {}, unit_q, unit_k, both, classes, kind, 3};
  if (two)
    for (auto& row : dense(tail)) truth.q.push_back(row);
  Numbers<int64_t> order(classes ? rows : 0), group(classes ? rows : 0);
  if (classes) {
    for (int64_t i = 0; i < rows; ++i) truth.label.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(rows)));
    std::iota(order.data, order.data + rows, 0);
    std::stable_sort(order.data, order.data + rows, [&](int64_t a, int64_t b) { return truth.label[static_cast<size_t>(a)] < truth.label[static_cast<size_t>(b)]; });
    for (int64_t e = 0; e < rows; ++e) group[e] = truth.label[static_cast<size_t>(order[e])];
  }

  const auto exclude = classes ? ffcl::Exclude::same_id : given ? ffcl::Exclude::none : ffcl::Exclude::diagonal;
  const ffcl::Similarity pairs{q.data, classes ? nullptr : k.data, rows, cols, dim, q.stride, k.stride, dtype, 3, nullptr, nullptr,
                               exclude, static_cast<int>(1 + random() % 4), nullptr, nullptr, two ? tail.data : nullptr, split, tail.stride};
  const ffcl::ContrastLoss problem{pairs, given ? positive.data : nullptr, positive.stride, order.data, group.data, unit_q, unit_k, 1e-12, both, kind};
  const int64_t norms = (unit_q ? rows * (given ? 2 : 1) : 0) + (unit_k && !classes ? cols : 0);
  const int64_t vectors = (norms + rows * (both ? 4 : 2) + 15) / 16 * 16;
  const int64_t cache = random() % 3 ? 16 + 2 * (rows + (classes ? 0 : cols)) + static_cast<int64_t>(random() % 40000) : 0;
  Numbers<float> state(vectors + cache), count(classes ? rows : 0), loss(rows), grad(rows);
  grad.fill(random);
  char name[160];
  std::snprintf(name, sizeof name, "contrast rows %lld cols %lld dim %lld dtype %d classes %d given %d both %d two %d unit %d %d", static_cast<long long>(rows),
                static_cast<long long>(cols), static_cast<long long>(dim), static_cast<int>(dtype), classes, given, both, two, unit_q, unit_k);
  if (int status = ffcl::contrast_forward(problem, state.data, state.count, count.data, loss.data))
    return std::fprintf(stderr, "%s: forward gave %d\n", name, status), false;
  const std::vector<double> want = truth.losses();
  Compare near_loss("loss"), near_change("change");
  for (int64_t i = 0; i < rows; ++i) near_loss(loss[i], want[static_cast<size_t>(i)]);
  // bfloat16 products are of rounded pairs.
  const double tolerance = dtype == ffcl::DType::float32 ? 1e-5 : 2e-3;
  bool right = near_loss.near(tolerance, 1, name);

  const bool need_q = random() % 4, need_k = !classes && random() % 4, need_positive = given && random() % 4;
  Numbers<float> dq(need_q ? rows * dim : 0), dk(need_k ? cols * dim : 0), dp(need_positive ? rows * dim : 0), d_scale(need_q ? 1 : 0);
  if (int status = ffcl::contrast_backward(problem, state.data, state.count, count.data, grad.data, dq.data, dk.data, dp.data, d_scale.data))
    return std::fprintf(stderr, "%s: backward gave %d\n", name, status), false;
  std::normal_distribution<double> normal;
  double change = 0;
  Truth ahead = truth, behind = truth;
  const double step = 1e-5;
  const auto move = [&](const Numbers<float>& d, Matrix& plus, Matrix& minus) {
    for (int64_t i = 0; i < d.count; ++i) {
      const double v = normal(random);
      change += v * static_cast<double>(d[i]);
      plus[static_cast<size_t>(i / dim)][static_cast<size_t>(i % dim)] += step * v;
      minus[static_cast<size_t>(i / dim)][static_cast<size_t>(i % dim)] -= step * v;
    }
  };
  move(dq, ahead.q, behind.q), move(dk, ahead.k, behind.k), move(dp, ahead.positive, behind.positive);
  if (d_scale.count) change += static_cast<double>(d_scale[0]), ahead.scale += step, behind.scale -= step;
  double difference = 0, size = 0;
  const std::vector<double> up = ahead.losses(), down = behind.losses();
  for (int64_t i = 0; i < rows; ++i) {
    const double by = static_cast<double>(grad[i]) * (up[static_cast<size_t>(i)] - down[static_cast<size_t>(i)]) / (2 * step);
    difference += by, size += std::fabs(by);
  }
  near_change(change, difference);
  return near_change.near(tolerance * 10, size + static_cast<double>(rows), name) && right;
}
