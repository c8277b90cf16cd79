// Random problems for rows.h, with the truth written out in double.
#include "rows.h"

#include <algorithm>
#include <numeric>

#include "guarded.h"

namespace {

// Rows in one or two tensors, perhaps divided by norms, beside what they stand for.
struct View {
  View(Random& random, ffcl::DType dtype, int64_t rows, int64_t dim, bool two, bool divided)
      : split(two ? 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(rows - 1)) : rows),
        x(dtype, split, dim, pick(random, {0, 0, 3})),
        tail(dtype, std::max<int64_t>(1, rows - split), dim, pick(random, {0, 1})),
        norm(divided ? rows : 0),
        native{x.data, rows, dim, x.stride, dtype, two ? tail.data : nullptr, split, tail.stride, nullptr} {
    x.fill(random, 1);
    tail.fill(random, 1);
    for (int64_t i = 0; i < norm.count; ++i) norm[i] = static_cast<float>(0.5 + i % 3);
    native.norm = norm.data;
  }
  double raw(int64_t i, int64_t d) const { return i < split ? x.at(i, d) : tail.at(i - split, d); }
  double at(int64_t i, int64_t d) const { return norm.count ? raw(i, d) / static_cast<double>(norm[i]) : raw(i, d); }
  int64_t split;
  Rows x, tail;
  Numbers<float> norm;
  ffcl::Rows native;
};

}  // namespace

bool check_rows(Random& random, bool large) {
  const int64_t n = large ? pick(random, {257, 1031}) : pick(random, {1, 2, 3, 7, 33});
  const int64_t dim = large ? pick(random, {129, 300}) : pick(random, {1, 5, 8, 17, 31});
  const auto dtype = static_cast<ffcl::DType>(random() % 3);
  const int threads = static_cast<int>(1 + random() % 4);
  const View z(random, dtype, n, dim, n > 1 && random() % 2, random() % 2);
  const View other(random, dtype, n + static_cast<int64_t>(random() % 3), dim, false, random() % 2);
  char name[120];
  std::snprintf(name, sizeof name, "rows %lld dim %lld dtype %d threads %d", static_cast<long long>(n),
                static_cast<long long>(dim), static_cast<int>(dtype), threads);
  bool right = true;
  const auto done = [&](const char* what, int status) {
    if (status) std::fprintf(stderr, "%s: %s gave %d\n", name, what, status), right = false;
  };

  Numbers<float> norm(n), weight(n), grad(n * dim), classes_grad(n * dim);
  Numbers<double> dot(n), class_dot(n), inner(n);
  weight.fill(random), grad.fill(random);
  for (int64_t i = 0; i < grad.count; ++i) classes_grad[i] = grad[i];
  std::vector<double> want(static_cast<size_t>(grad.count)), want_classes(want.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = want_classes[i] = grad[static_cast<int64_t>(i)];

  done("row_norms", ffcl::row_norms(z.native, 1e-12, threads, norm.data));
  done("row_dots", ffcl::row_dots(z.native, other.native, threads, dot.data));
  done("add_weighted_rows", ffcl::add_weighted_rows(z.native, weight.data, threads, grad.data));
  Compare near_norm("norm"), near_dot("dot"), near_grad("grad"), near_class("class_dot"), near_classes("classes' grad");
  for (int64_t i = 0; i < n; ++i) {
    double squares = 0, product = 0;
    for (int64_t d = 0; d < dim; ++d) {
      squares += z.raw(i, d) * z.raw(i, d), product += z.at(i, d) * other.at(i, d);
      want[static_cast<size_t>(i * dim + d)] += static_cast<double>(weight[i]) * z.at(i, d);
    }
    near_norm(norm[i], std::fmax(std::sqrt(squares), 1e-12)), near_dot(dot[i], product);
  }
  for (int64_t i = 0; i < grad.count; ++i) near_grad(grad[i], want[static_cast<size_t>(i)]);

  // Classes of every size, listed class by class.
  std::vector<int64_t> label(static_cast<size_t>(n));
  const uint64_t kinds = 1 + random() % static_cast<uint64_t>(n);
  for (auto& l : label) l = static_cast<int64_t>(random() % kinds);
  Numbers<int64_t> order(n), group(n), ids(n);
  Numbers<float> count(n);
  std::iota(order.data, order.data + n, 0);
  std::stable_sort(order.data, order.data + n, [&](int64_t a, int64_t b) { return label[static_cast<size_t>(a)] < label[static_cast<size_t>(b)]; });
  for (int64_t e = 0; e < n; ++e) group[e] = label[static_cast<size_t>(order[e])];
  done("class_ids", ffcl::class_ids(n, order.data, group.data, ids.data, count.data));
  done("class_dots", ffcl::class_dots(z.native, order.data, group.data, threads, class_dot.data));
  done("add_class_gradient", ffcl::add_class_gradient(z.native, order.data, group.data, weight.data, threads, classes_grad.data));
  for (int64_t i = 0; i < n; ++i) {
    double others = 0, product = 0;
    for (int64_t p = 0; p < n; ++p) {
      if (p == i || label[static_cast<size_t>(p)] != label[static_cast<size_t>(i)]) continue;
      ++others;
      for (int64_t d = 0; d < dim; ++d) {
        product += z.at(i, d) * z.at(p, d);
        want_classes[static_cast<size_t>(i * dim + d)] += (static_cast<double>(weight[i]) + weight[p]) * z.at(p, d);
      }
    }
    if (static_cast<double>(count[i]) != others) std::fprintf(stderr, "%s: count is wrong\n", name), right = false;
    near_class(class_dot[i], product);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) {
      const bool pair = label[static_cast<size_t>(i)] == label[static_cast<size_t>(j)] && static_cast<double>(count[i]) == 1;
      if ((ids[i] == ids[j]) != pair) std::fprintf(stderr, "%s: ids are wrong\n", name), right = false;
    }
  for (int64_t i = 0; i < classes_grad.count; ++i) near_classes(classes_grad[i], want_classes[static_cast<size_t>(i)]);

  for (int64_t i = 0; i < n * dim; ++i) want[static_cast<size_t>(i)] = grad[i];
  done("finish_gradient", ffcl::finish_gradient(z.native, 1e-12, threads, grad.data, inner.data));
  Compare near_inner("inner"), near_finished("finished grad");
  for (int64_t i = 0; i < n; ++i) {
    double product = 0;
    for (int64_t d = 0; d < dim; ++d) product += z.at(i, d) * want[static_cast<size_t>(i * dim + d)];
    near_inner(inner[i], product);
    for (int64_t d = 0; d < dim; ++d) {
      const double g = want[static_cast<size_t>(i * dim + d)];
      near_finished(grad[i * dim + d], z.norm.count ? (g - z.at(i, d) * product) / static_cast<double>(z.norm[i]) : g);
    }
  }

  // Losses and weights, with every pointer that may be null null in turn.
  const auto kind = static_cast<ffcl::Contrast>(random() % 3);
  const bool mean = kind == ffcl::Contrast::mean, columns = random() % 2;
  Numbers<float> lse(n), loss(n), slope(n), col_slope(columns ? n : 0), row_grad(n), col_grad(columns ? n : 0), share(n);
  lse.fill(random), loss.fill(random), col_slope.fill(random);
  done("contrast_losses", ffcl::contrast_losses(n, lse.data, dot.data, mean ? count.data : nullptr, 2, kind, false, loss.data, slope.data));
  done("contrast_weights", ffcl::contrast_weights(n, weight.data, slope.data, col_slope.data, mean ? count.data : nullptr, 2,
                                                  row_grad.data, col_grad.data, share.data));
  Compare near_loss("loss"), near_share("weight");
  for (int64_t i = 0; i < n; ++i) {
    const double positives = mean ? static_cast<double>(count[i]) : 1, x = lse[i] - 2 * dot[i] / positives;
    const bool soft = kind == ffcl::Contrast::softplus || (mean && positives == 1);
    const double value = soft ? std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))) : x;
    near_loss(loss[i], positives > 0 ? value : 0);
    const double slopes = static_cast<double>(slope[i]) + (columns ? static_cast<double>(col_slope[i]) : 0);
    near_share(share[i], positives > 0 ? -2 * static_cast<double>(weight[i]) * slopes / positives : 0);
  }
  for (const Compare* c : {&near_norm, &near_dot, &near_grad, &near_class, &near_classes, &near_inner, &near_finished, &near_loss, &near_share})
    right = c->near(1e-5, 1, name) && right;
  return right;
}
