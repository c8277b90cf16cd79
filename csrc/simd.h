// One vector of floats as wide as the instruction set, and the few operations the kernels need on it.
//
// Rule for every file that includes this: no function template or inline function of the standard library whose code
// the linker could merge with another file's copy (std::vector, std::sort, ...): such a copy may hold AVX-512 code and
// be called on a machine without it. Everything here is in the instruction set's own namespace or is a macro.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#ifndef FFCL_ISA_NS
#define FFCL_ISA_NS portable
#endif

#define FFCL_INLINE inline __attribute__((always_inline))

namespace ffcl {
namespace FFCL_ISA_NS {

#if defined(FFCL_WIDTH)
constexpr int VW = FFCL_WIDTH;  // a wider set's tiles in the compiler's own code, for tests
#elif defined(__AVX512F__)
constexpr int VW = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef float vf_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));  // unaligned access

FFCL_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
FFCL_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
FFCL_INLINE vf splat(float x) {  // not vf{} + x: the compiler keeps that addition, for the sake of -0
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  vf v;
  for (int i = 0; i < VW; ++i) v[i] = x;
  return v;
#endif
}
FFCL_INLINE vi load_int(const int32_t* p) {
  typedef int32_t vi_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
  return *reinterpret_cast<const vi_any*>(p);
}
FFCL_INLINE vf zero() { return vf{}; }
FFCL_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
FFCL_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }

// max and min return the second operand where either is NaN, as x86's instructions do: put what must survive second.
FFCL_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__) && !defined(FFCL_WIDTH)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
FFCL_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__) && !defined(FFCL_WIDTH)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

FFCL_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  int32_t bits = 0;
  for (int i = 0; i < VW; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

FFCL_INLINE float sum(vf x) {
  float s = 0;
  for (int half = VW / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  s = x[0];
  return s;
}

// 2^(x - offset) to 1.2 units in the last place; 0 where x - offset < -126.5, inf from 128 on, NaN for NaN. The offset
// is an integer so that it moves the exponent only and costs x no bits. Range reduction to [-1/2, 1/2], then the
// minimax polynomial of degree 6: ten instructions.
FFCL_INLINE vf exp2(vf x, int32_t offset = 0) {
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = max(splat(static_cast<float>(offset - 127)), min(splat(static_cast<float>(offset + 128)), x));
  const vf shifted = x + shifter;
  const vf f = x - (shifted - shifter);
  vf p = splat(1.5353358e-4f);
  p = p * f + splat(1.3398875e-3f);
  p = p * f + splat(9.6184374e-3f);
  p = p * f + splat(5.5503325e-2f);
  p = p * f + splat(2.4022648e-1f);
  p = p * f + splat(6.9314720e-1f);
  p = p * f + splat(1.0f);
  const vi exponent = (as_int(shifted) + (127 - offset - 0x4B400000)) << 23;
  return p * as_float(exponent);
}

// 16-bit floats -------------------------------------------------------------------------------------------------------

FFCL_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FFCL_INLINE uint16_t float_to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FFCL_INLINE float fp16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Shift exponent and mantissa into place, rebase the exponent by a multiplication (it also normalises subnormals).
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  x *= 5.192296858534828e33f;  // 2^112
  __builtin_memcpy(&bits, &x, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}
FFCL_INLINE uint16_t float_to_fp16(float x) {  // round to nearest even; overflow to inf
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000u) {  // subnormal half: let a float addition do the rounding
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y += 0.5f;
    uint32_t r;
    __builtin_memcpy(&r, &y, 4);
    return static_cast<uint16_t>(sign | (r - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1;
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfff + odd) >> 13));
#endif
}

// Pairs of bfloat16, the first in the low half of a 32-bit lane.

// acc + the products of both halves, accumulated in float32. The products are exact, so all forms differ by nothing but
// the instruction's flushing of subnormals to zero.
FFCL_INLINE vf dot_pairs(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const vi high = vi{} - 0x10000;
  acc += as_float(a & high) * as_float(b & high);
  return acc + as_float(a << 16) * as_float(b << 16);
#endif
}

// Lane by lane (bfloat16(low), bfloat16(high)), rounded to nearest even; NaN stays NaN.
FFCL_INLINE vi to_pairs(vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));  // `low` in the lower 16 elements
  const __m512i first = reinterpret_cast<__m512i>(vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  const __m512i order = _mm512_or_si512(first, _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(16)), 16));
  return reinterpret_cast<vi>(_mm512_permutexvar_epi16(order, halves));
#else
  const vi l = as_int(low), h = as_int(high);
  const vi l_nan = low != low, h_nan = high != high;
  const vi l_bits = ((l + 0x7fff + ((l >> 16) & 1)) & ~l_nan) | (0x7fc00000 & l_nan);
  const vi h_bits = ((h + 0x7fff + ((h >> 16) & 1)) & ~h_nan) | (0x7fc00000 & h_nan);
  return ((l_bits >> 16) & 0xffff) | (h_bits & (vi{} - 0x10000));
#endif
}

// Element and vector access by storage type.
struct Float32 {
  typedef float type;
  static FFCL_INLINE float get(const type* p) { return *p; }
  static FFCL_INLINE void put(type* p, float x) { *p = x; }
  static FFCL_INLINE vf load_vector(const type* p) { return load(p); }
  static FFCL_INLINE void store_vector(type* p, vf x) { store(p, x); }
};
struct BFloat16 {
  typedef uint16_t type;
  static FFCL_INLINE float get(const type* p) { return bf16_to_float(*p); }
  static FFCL_INLINE void put(type* p, float x) { *p = float_to_bf16(x); }
  static FFCL_INLINE vf load_vector(const type* p) {
    typedef uint16_t vh __attribute__((vector_size(VW * 2), aligned(2), may_alias));
    return as_float(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vi) << 16);
  }
  static FFCL_INLINE void store_vector(type* p, vf x) {
    typedef uint16_t vh __attribute__((vector_size(VW * 2), aligned(2), may_alias));
    const vi bits = as_int(x);
    const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vi nan = (x != x);
    *reinterpret_cast<vh*>(p) = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
  }
};
struct Float16 {
  typedef uint16_t type;
  static FFCL_INLINE float get(const type* p) { return fp16_to_float(*p); }
  static FFCL_INLINE void put(type* p, float x) { *p = float_to_fp16(x); }
  static FFCL_INLINE vf load_vector(const type* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf x;
    for (int i = 0; i < VW; ++i) x[i] = fp16_to_float(p[i]);
    return x;
#endif
  }
  static FFCL_INLINE void store_vector(type* p, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#else
    for (int i = 0; i < VW; ++i) p[i] = float_to_fp16(x[i]);
#endif
  }
};

}  // namespace FFCL_ISA_NS
}  // namespace ffcl
