// Random problems for goodness.h, with the truth written out in double.
#include "goodness.h"

#include "guarded.h"

namespace {

struct Layer {
  Layer(Random& random, bool large) {
    rows = large ? pick(random, {9, 40, 65}) : pick(random, {1, 2, 3, 7, 16});
    dim = large ? pick(random, {4095, 4096, 4097, 9001}) : pick(random, {1, 2, 7, 8, 15, 16, 17, 31, 63, 65, 130, 1000});
    gap = pick(random, {0, 0, 1, 5});
    dtype = static_cast<ffcl::DType>(random() % 3);
    relu = random() % 2;
    mean = random() % 2;
    threads = static_cast<int>(1 + random() % 4);
    std::snprintf(name, sizeof name, "rows %lld dim %lld gap %lld dtype %d relu %d mean %d threads %d",
                  static_cast<long long>(rows), static_cast<long long>(dim), static_cast<long long>(gap),
                  static_cast<int>(dtype), relu, mean, threads);
    tolerance = dtype == ffcl::DType::float32 ? 1e-4 : dtype == ffcl::DType::bfloat16 ? 1.0 / 64 : 1.0 / 512;
  }
  double a(const Rows& h, int64_t i, int64_t j) const { return relu ? std::fmax(h.at(i, j), 0) : h.at(i, j); }
  bool cut(const Rows& h, int64_t i, int64_t j) const { return relu && h.at(i, j) <= 0; }
  ffcl::Activations args(const Rows& h) const { return {h.data, rows, dim, h.stride, dtype, relu, threads}; }
  int64_t rows, dim, gap;
  ffcl::DType dtype;
  bool relu, mean;
  int threads;
  double tolerance;
  char name[160];
};

}  // namespace

bool check_goodness(Random& random, bool large) {
  const Layer l(random, large);
  Rows h(l.dtype, l.rows, l.dim, l.gap), out(l.dtype, l.rows, l.dim), grad_out(l.dtype, l.rows, l.dim), dh(l.dtype, l.rows, l.dim);
  h.fill(random, 1), grad_out.fill(random, 1);
  if (random() % 4 == 0)
    for (int64_t j = 0; j < l.dim; ++j) h.set(0, j, 0);
  const bool normalised = random() % 2, with_goodness = !normalised || random() % 2;
  const double eps = 0.05;  // the gradient of a row of zeros stays within float16
  Numbers<float> goodness(l.rows), grad(with_goodness ? l.rows : 0);
  grad.fill(random);
  int status = ffcl::goodness_forward(l.args(h), l.mean, eps, goodness.data, normalised ? out.data : nullptr);
  status = status ? status
                  : ffcl::goodness_backward(l.args(h), l.mean, eps, goodness.data, grad.data,
                                            normalised ? grad_out.data : nullptr, dh.data);
  if (status) return std::fprintf(stderr, "goodness %s: status %d\n", l.name, status), false;
  Compare near_goodness("goodness"), near_out("out"), near_dh("dh");
  for (int64_t i = 0; i < l.rows; ++i) {
    double squares = 0, along = 0;
    for (int64_t j = 0; j < l.dim; ++j) squares += l.a(h, i, j) * l.a(h, i, j);
    for (int64_t j = 0; j < l.dim; ++j) along += l.a(h, i, j) * grad_out.at(i, j);
    near_goodness(goodness[i], l.mean ? squares / static_cast<double>(l.dim) : squares);
    const double n = static_cast<double>(l.dim), r = std::sqrt(squares / n), s = r + eps;
    for (int64_t j = 0; j < l.dim; ++j) {
      if (normalised) near_out(out.at(i, j), squares == 0 ? 0 : l.a(h, i, j) / s);
      double truth = with_goodness ? grad[i] * 2 * l.a(h, i, j) / (l.mean ? n : 1) : 0;
      if (normalised) truth += grad_out.at(i, j) / s - (r == 0 ? 0 : l.a(h, i, j) * along / (s * s * r * n));
      near_dh(dh.at(i, j), l.cut(h, i, j) ? 0 : truth);
    }
  }
  bool right = near_goodness.near(1e-5, 1e-6, l.name);
  right = near_out.near(l.tolerance, 1e-6, l.name) && right;
  return near_dh.near(l.tolerance, 1e-3, l.name) && right;
}

bool check_pair_cosine(Random& random, bool large) {
  const Layer l(random, large);
  Rows h1(l.dtype, l.rows, l.dim, l.gap), h2(l.dtype, l.rows, l.dim, pick(random, {0, 3}));
  h1.fill(random, 1), h2.fill(random, 1);
  Numbers<float> target(l.rows), loss(l.rows), coefficients(3 * l.rows), grad(l.rows);
  for (int64_t i = 0; i < l.rows; ++i) target[i] = static_cast<float>(pick(random, {1, 1, -1, 0}));
  for (int64_t i = 0; i < l.rows; ++i) grad[i] = 0.5f;
  const bool first = random() % 3, second = random() % 3;
  Rows d1(l.dtype, l.rows, l.dim), d2(l.dtype, l.rows, l.dim), b1(l.dtype, l.rows, l.dim), b2(l.dtype, l.rows, l.dim);
  int status = ffcl::pair_cosine_forward(l.args(h1), h2.data, h2.stride, target.data, 0.1, 0.5, loss.data, coefficients.data,
                                         first ? d1.data : nullptr, second ? d2.data : nullptr);
  status = status ? status
                  : ffcl::pair_cosine_backward(l.args(h1), h2.data, h2.stride, coefficients.data, grad.data,
                                               first ? b1.data : nullptr, second ? b2.data : nullptr);
  if (status) return std::fprintf(stderr, "pair cosine %s: status %d\n", l.name, status), false;
  Compare near_loss("loss"), near_1("d1"), near_2("d2");
  for (int64_t i = 0; i < l.rows; ++i) {
    double dot = 0, n1 = 1e-12, n2 = 1e-12;
    for (int64_t j = 0; j < l.dim; ++j) {
      const double x = l.a(h1, i, j), y = l.a(h2, i, j);
      dot += x * y, n1 += x * x, n2 += y * y;
    }
    const double cosine = dot / std::sqrt(n1 * n2);
    const bool near_margin = target[i] == -1 && std::fabs(cosine - 0.1) < 1e-3;  // either side is right
    const double weight = target[i] == 1 ? -1 : target[i] == -1 && cosine > 0.1 ? 1 : 0;
    near_loss(loss[i], target[i] == 1 ? 1 - cosine : target[i] == -1 ? std::fmax(0, cosine - 0.1) : 0);
    for (int64_t j = 0; j < l.dim && !near_margin; ++j) {
      const double x = l.a(h1, i, j), y = l.a(h2, i, j);
      const double t1 = l.cut(h1, i, j) ? 0 : 0.5 * weight * (y / std::sqrt(n1 * n2) - cosine * x / n1);
      const double t2 = l.cut(h2, i, j) ? 0 : 0.5 * weight * (x / std::sqrt(n1 * n2) - cosine * y / n2);
      // Of vectors as long as their sample: what cancels in a gradient is as large as the sample is short.
      const double r1 = std::sqrt(n1), r2 = std::sqrt(n2);
      if (first) near_1(r1 * d1.at(i, j), r1 * t1), near_1(r1 * b1.at(i, j), r1 * t1);
      if (second) near_2(r2 * d2.at(i, j), r2 * t2), near_2(r2 * b2.at(i, j), r2 * t2);
    }
  }
  bool right = near_loss.near(1e-5, 1, l.name);
  right = near_1.near(l.tolerance, 1.0 / std::sqrt(static_cast<double>(l.dim)), l.name) && right;
  return near_2.near(l.tolerance, 1.0 / std::sqrt(static_cast<double>(l.dim)), l.name) && right;
}

bool check_pool(Random& random, bool large) {
  const Layer l(random, false);
  const int64_t samples = l.rows, channels = large ? pick(random, {65, 511, 512, 513}) : pick(random, {1, 3, 16, 33, 65});
  const int64_t positions = large ? pick(random, {49, 64, 65}) : pick(random, {1, 4, 9, 17, 63, 130});
  const bool last = random() % 2, with_goodness = random() % 3, with_pooled = random() % 3;
  Rows h(l.dtype, samples, channels * positions, l.gap), dh(l.dtype, samples, channels * positions);
  h.fill(random, 1);
  Numbers<float> goodness(samples), pooled(samples * channels), grad_goodness(with_goodness ? samples : 0);
  Numbers<float> grad_pooled(with_pooled ? samples * channels : 0);
  grad_goodness.fill(random), grad_pooled.fill(random);
  const ffcl::Maps maps{h.data, samples, channels, positions, h.stride, last, l.dtype, l.relu, l.threads};
  int status = ffcl::pool_goodness_forward(maps, l.mean, goodness.data, pooled.data);
  status = status ? status
                  : ffcl::pool_goodness_backward(maps, l.mean, pooled.data, grad_goodness.data, grad_pooled.data, dh.data);
  if (status) return std::fprintf(stderr, "pool %s: status %d\n", l.name, status), false;
  Compare near_pooled("pooled"), near_goodness("pooled goodness"), near_dh("pooled dh");
  for (int64_t n = 0; n < samples; ++n) {
    double squares = 0;
    const double factor = l.mean ? 2.0 / static_cast<double>(channels) : 2.0;
    for (int64_t c = 0; c < channels; ++c) {
      const auto at = [&](int64_t x) { return last ? x * channels + c : c * positions + x; };
      double sum = 0;
      for (int64_t x = 0; x < positions; ++x) sum += l.a(h, n, at(x));
      sum /= static_cast<double>(positions);
      squares += sum * sum;
      near_pooled(pooled[n * channels + c], sum);
      const double down = (with_goodness ? factor * grad_goodness[n] * sum : 0) + (with_pooled ? grad_pooled[n * channels + c] : 0);
      for (int64_t x = 0; x < positions; ++x)
        near_dh(dh.at(n, at(x)), l.cut(h, n, at(x)) ? 0 : down / static_cast<double>(positions));
    }
    near_goodness(goodness[n], l.mean ? squares / static_cast<double>(channels) : squares);
  }
  bool right = near_pooled.near(1e-5, 0.1, l.name);
  right = near_goodness.near(1e-4, 1e-2, l.name) && right;
  return near_dh.near(l.tolerance, 1e-3, l.name) && right;
}
