// float16 for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

__attribute__((always_inline)) inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float size;
  if (exponent == 31)
    size = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else
    size = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  return x.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (std::isnan(f)) return {0x7fff};
  const float size = std::fabs(f);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size == 0.f) return {sign};
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));  // at most 2048, which carries by itself
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + steps))};
}
