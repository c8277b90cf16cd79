// Arrays whose surroundings are poisoned: reading or writing beside them is an error under AddressSanitizer, and what
// the gaps between rows hold is NaN, so that reading them shows in the results of every build.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "isa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#endif

constexpr double NaN = std::numeric_limits<double>::quiet_NaN();

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
// Written apart from csrc/simd.h on purpose: by the definition of the format.
inline float from_float16(uint16_t x) {
  const int exponent = (x >> 10) & 31, fraction = x & 1023;
  const float sign = x >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
}
inline uint16_t to_float16(float x) {  // nearest, of normal numbers and zero only
  if (x == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
  if (exponent < -13) return 0;
  const int mantissa = static_cast<int>(std::lround(std::ldexp(fraction, 11)));  // in [1024, 2048]
  return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) + ((exponent + 13) << 10) + mantissa);
}

// `rows` rows of `dim` elements of a dtype, `stride` elements apart.
class Rows {
 public:
  Rows(ffcl::DType dtype, int64_t rows, int64_t dim, int64_t gap = 0)
      : rows(rows), dim(dim), stride(dim + gap), dtype(dtype), size(dtype == ffcl::DType::float32 ? 4 : 2) {
    bytes = static_cast<size_t>(((rows - 1) * stride + dim) * size);
    data = static_cast<char*>(std::malloc(bytes));
    std::memset(data, 0xff, bytes);  // NaN in each of the three formats
    for (int64_t i = 0; i + 1 < rows && gap; ++i) ASAN_POISON_MEMORY_REGION(data + (i * stride + dim) * size, gap * size);
  }
  ~Rows() {
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    std::free(data);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  double at(int64_t i, int64_t j) const {
    const char* p = data + (i * stride + j) * size;
    if (size == 4) {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, p, 2);
    return dtype == ffcl::DType::bfloat16 ? from_bfloat16(x) : from_float16(x);
  }
  void set(int64_t i, int64_t j, double value) {
    char* p = data + (i * stride + j) * size;
    const float x = static_cast<float>(value);
    if (size == 4) {
      std::memcpy(p, &x, 4);
      return;
    }
    const uint16_t half = dtype == ffcl::DType::bfloat16 ? to_bfloat16(x) : to_float16(x);
    std::memcpy(p, &half, 2);
  }
  template <class Random>
  void fill(Random& random, double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < dim; ++j) set(i, j, normal(random));
  }
  int64_t rows, dim, stride;
  ffcl::DType dtype;
  char* data;

 private:
  int64_t size;
  size_t bytes;
};

// `count` numbers on the heap, filled with NaN (integers: 0x7f7f...); a count of 0 is a null pointer.
template <class T>
class Numbers {
 public:
  explicit Numbers(int64_t count) : count(count) {
    if (!count) return;
    data = static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T)));
    for (int64_t i = 0; i < count; ++i)
      data[i] = std::is_floating_point<T>::value ? static_cast<T>(NaN) : static_cast<T>(0x7f7f7f7f);
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
  template <class Random>
  void fill(Random& random) {
    std::normal_distribution<double> normal(0, 1);
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<T>(normal(random));
  }
  int64_t count;
  T* data = nullptr;
};

// Compares many numbers with their truth: the largest difference against the truth's largest magnitude.
class Compare {
 public:
  explicit Compare(const char* name) : name(name) {}
  void operator()(double got, double truth) {
    ++seen;
    if (std::isnan(truth) || std::isinf(truth)) {
      odd += !(std::isnan(truth) ? std::isnan(got) : got == truth);
      return;
    }
    if (!std::isfinite(got)) ++odd;
    const double difference = std::fabs(got - truth);
    if (difference > error) error = difference;
    if (std::fabs(truth) > magnitude) magnitude = std::fabs(truth);
  }
  // Whether all is near; says what is not.
  bool near(double tolerance, double floor, const char* what) const {
    const double limit = tolerance * (magnitude > floor ? magnitude : floor);
    if (!odd && error <= limit) return true;
    std::fprintf(stderr, "%s: %s is wrong: error %g over %g, %lld of %lld not finite where they should be, or the reverse\n",
                 what, name, error, limit, static_cast<long long>(odd), static_cast<long long>(seen));
    return false;
  }

 private:
  const char* name;
  double error = 0, magnitude = 0;
  int64_t odd = 0, seen = 0;
};

using Random = std::mt19937_64;
inline int64_t pick(Random& random, std::initializer_list<int64_t> values) {
  return values.begin()[random() % values.size()];
}

bool check_similarity(Random& random, bool large);  // one random problem each, true where the results are right
bool check_siglip(Random& random, bool large);
bool check_contrast(Random& random, bool large);
bool check_goodness(Random& random, bool large);
bool check_pair_cosine(Random& random, bool large);
bool check_pool(Random& random, bool large);
bool check_rows(Random& random, bool large);
bool check_refusals();
