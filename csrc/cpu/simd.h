// Sixteen floats at a time, the same for every instruction set: one register of AVX-512, two of AVX2, plain
// loops elsewhere. Included by *_simd.cpp alone; everything is in a namespace named after the level and has
// internal linkage (see dispatch.h). Loads and stores take any alignment that the element type allows.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef LCT_X86
#include <immintrin.h>
#endif

#ifndef LCT_SIMD_LEVEL
#error "compile this file once a level, with -DLCT_SIMD_LEVEL=scalar, avx2 or avx512"
#endif

#define LCT_INLINE static inline __attribute__((always_inline))

namespace lct {
namespace LCT_SIMD_LEVEL {

constexpr int kLanes = 16;

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};

LCT_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
LCT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LCT_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
LCT_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LCT_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LCT_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LCT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN.
LCT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// x where a > b, else 0.
LCT_INLINE Vec keep_where_greater(Vec a, Vec b, Vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
// 0 where a < b, else x (also where a is NaN).
LCT_INLINE Vec zero_where_less(Vec a, Vec b, Vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
// The first n lanes of x, `other` in the rest.
LCT_INLINE Vec first_lanes(Vec x, int n, float other) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>((1u << n) - 1), x.v)};
}
LCT_INLINE float reduce_add(Vec x) { return _mm512_reduce_add_ps(x.v); }
LCT_INLINE float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }
LCT_INLINE Vec round(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for a whole n with a normal 2^n.
LCT_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// x = mantissa * 2^exponent with the mantissa in [1, 2), for a positive normal x.
LCT_INLINE void split_exponent(Vec x, Vec& mantissa, Vec& exponent) {
  mantissa.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  exponent.v = _mm512_getexp_ps(x.v);
}
LCT_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }

LCT_INLINE Vec inverse(Vec x) { return {_mm512_div_ps(_mm512_set1_ps(1.0f), x.v)}; }
LCT_INLINE Vec subtract_one_at(Vec x, int lane) {
  return {_mm512_mask_sub_ps(x.v, static_cast<__mmask16>(1u << lane), x.v, _mm512_set1_ps(1.0f))};
}
// Lane j of row i changes places with lane i of row j.
LCT_INLINE void transpose(Vec (&x)[kLanes]) {
  __m512 y[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    y[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  // Now squares of four: z[4 i + j] holds column j of rows 4 i to 4 i + 3 in each of its quarters.
  __m512 z[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    z[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    z[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
    z[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    z[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(z[j], z[4 + j], 0x88), b = _mm512_shuffle_f32x4(z[j], z[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(z[8 + j], z[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(z[8 + j], z[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[j + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[j + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[j + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

LCT_INLINE Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LCT_INLINE Vec load(const Bfloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
LCT_INLINE __m256i to_half(Vec x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LCT_INLINE __m256i to_bfloat16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
LCT_INLINE void store(Half* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(x)); }
LCT_INLINE void store(Bfloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x));
}
LCT_INLINE void store_first(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
}
LCT_INLINE void store_first(Half* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), to_half(x));
}
LCT_INLINE void store_first(Bfloat16* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), to_bfloat16(x));
}
LCT_INLINE Vec load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};

LCT_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LCT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LCT_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
LCT_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LCT_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LCT_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LCT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LCT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LCT_INLINE Vec inverse(Vec x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, x.lo), _mm256_div_ps(one, x.hi)};
}
LCT_INLINE Vec keep_where_greater(Vec a, Vec b, Vec x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), x.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ), x.hi)};
}
LCT_INLINE Vec zero_where_less(Vec a, Vec b, Vec x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), x.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), x.hi)};
}
LCT_INLINE __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LCT_INLINE Vec first_lanes(Vec x, int n, float other) {
  const __m256 rest = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(rest, x.lo, _mm256_castsi256_ps(first_mask(n))),
          _mm256_blendv_ps(rest, x.hi, _mm256_castsi256_ps(first_mask(n - 8)))};
}
LCT_INLINE float reduce_add(Vec x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LCT_INLINE float reduce_max(Vec x) {
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
LCT_INLINE Vec round(Vec x) {
  return {_mm256_round_ps(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LCT_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
LCT_INLINE Vec scale_by_power(Vec x, Vec n) {
  return {_mm256_mul_ps(x.lo, power_of_two(n.lo)), _mm256_mul_ps(x.hi, power_of_two(n.hi))};
}
LCT_INLINE void split_exponent(__m256 x, __m256& mantissa, __m256& exponent) {
  const __m256i bits = _mm256_castps_si256(x);
  exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
  mantissa = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)),
                                                 _mm256_set1_epi32(0x3f800000)));
}
LCT_INLINE void split_exponent(Vec x, Vec& mantissa, Vec& exponent) {
  split_exponent(x.lo, mantissa.lo, exponent.lo);
  split_exponent(x.hi, mantissa.hi, exponent.hi);
}
LCT_INLINE void stream(float* p, Vec x) {
  _mm256_stream_ps(p, x.lo);
  _mm256_stream_ps(p + 8, x.hi);
}

LCT_INLINE Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
LCT_INLINE __m256 from_bfloat16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
LCT_INLINE Vec load(const Bfloat16* p) {
  return {from_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          from_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
LCT_INLINE __m256i rounded_to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
LCT_INLINE void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LCT_INLINE void store(Bfloat16* p, Vec x) {
  const __m256i pairs = _mm256_packus_epi32(rounded_to_bfloat16(x.lo), rounded_to_bfloat16(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xd8));
}
LCT_INLINE void store_first(float* p, Vec x, int n) {
  _mm256_maskstore_ps(p, first_mask(n), x.lo);
  if (n > 8) _mm256_maskstore_ps(p + 8, first_mask(n - 8), x.hi);
}
LCT_INLINE Vec load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_mask(n)),
          n > 8 ? _mm256_maskload_ps(p + 8, first_mask(n - 8)) : _mm256_setzero_ps()};
}

#else

struct Vec {
  float v[kLanes];
};

#define LCT_EACH_LANE for (int i = 0; i < kLanes; ++i)

LCT_INLINE Vec broadcast(float x) {
  Vec r;
  LCT_EACH_LANE r.v[i] = x;
  return r;
}
LCT_INLINE Vec load(const float* p) {
  Vec r;
  LCT_EACH_LANE r.v[i] = p[i];
  return r;
}
LCT_INLINE void store(float* p, Vec x) { LCT_EACH_LANE p[i] = x.v[i]; }
LCT_INLINE Vec add(Vec a, Vec b) {
  LCT_EACH_LANE a.v[i] += b.v[i];
  return a;
}
LCT_INLINE Vec sub(Vec a, Vec b) {
  LCT_EACH_LANE a.v[i] -= b.v[i];
  return a;
}
LCT_INLINE Vec mul(Vec a, Vec b) {
  LCT_EACH_LANE a.v[i] *= b.v[i];
  return a;
}
LCT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  LCT_EACH_LANE c.v[i] += a.v[i] * b.v[i];
  return c;
}
LCT_INLINE Vec max(Vec a, Vec b) {
  LCT_EACH_LANE b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}
LCT_INLINE Vec inverse(Vec x) {
  LCT_EACH_LANE x.v[i] = 1.0f / x.v[i];
  return x;
}
LCT_INLINE Vec keep_where_greater(Vec a, Vec b, Vec x) {
  LCT_EACH_LANE x.v[i] = a.v[i] > b.v[i] ? x.v[i] : 0.0f;
  return x;
}
LCT_INLINE Vec zero_where_less(Vec a, Vec b, Vec x) {
  LCT_EACH_LANE x.v[i] = a.v[i] < b.v[i] ? 0.0f : x.v[i];
  return x;
}
LCT_INLINE Vec first_lanes(Vec x, int n, float other) {
  LCT_EACH_LANE x.v[i] = i < n ? x.v[i] : other;
  return x;
}
LCT_INLINE float reduce_add(Vec x) {
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  return x.v[0];
}
LCT_INLINE float reduce_max(Vec x) {
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] = x.v[i] > x.v[i + width] ? x.v[i] : x.v[i + width];
  return x.v[0];
}
LCT_INLINE Vec round(Vec x) {
  LCT_EACH_LANE x.v[i] = __builtin_rintf(x.v[i]);
  return x;
}
LCT_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
LCT_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
LCT_INLINE Vec scale_by_power(Vec x, Vec n) {
  LCT_EACH_LANE {
    // Out of range, where the caller discards the lane, the cast would be undefined.
    const float power = n.v[i] > -127.0f && n.v[i] < 128.0f ? n.v[i] : 0.0f;
    x.v[i] *= from_bits(static_cast<uint32_t>(static_cast<int32_t>(power) + 127) << 23);
  }
  return x;
}
LCT_INLINE void split_exponent(Vec x, Vec& mantissa, Vec& exponent) {
  LCT_EACH_LANE {
    const uint32_t bits = to_bits(x.v[i]);
    exponent.v[i] = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
    mantissa.v[i] = from_bits((bits & 0x7fffffu) | 0x3f800000u);
  }
}
LCT_INLINE void stream(float* p, Vec x) { store(p, x); }

LCT_INLINE float widen(Bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
LCT_INLINE float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
LCT_INLINE void narrow(float x, Bfloat16& to) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  to.bits = static_cast<uint16_t>(rounded >> 16);
}
LCT_INLINE void narrow(float x, Half& to) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding 0.5 puts the last place of a subnormal half where a float rounds, to nearest even.
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}
template <class T>
LCT_INLINE Vec load(const T* p) {
  Vec r;
  LCT_EACH_LANE r.v[i] = widen(p[i]);
  return r;
}
template <class T>
LCT_INLINE void store(T* p, Vec x) {
  LCT_EACH_LANE narrow(x.v[i], p[i]);
}
LCT_INLINE void store_first(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
LCT_INLINE Vec load_first(const float* p, int n) {
  Vec r = broadcast(0.0f);
  for (int i = 0; i < n; ++i) r.v[i] = p[i];
  return r;
}

#undef LCT_EACH_LANE

#endif

#if !defined(__AVX512F__)
template <class T>
LCT_INLINE void store_first(T* p, Vec x, int n) {
  T all[kLanes];
  store(all, x);
  memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
}
#endif

// The first n elements, zeros in the other lanes; nothing behind them is read.
template <class T>
LCT_INLINE Vec load_first(const T* p, int n) {
  T all[kLanes] = {};
  memcpy(all, p, static_cast<size_t>(n) * sizeof(T));
  return load(all);
}

// e^x for x <= 0 or NaN, within 2 ulp; 0 where the result would be subnormal.
LCT_INLINE Vec exp_nonpositive(Vec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; the polynomial is Cephes' expf.
  const Vec n = round(mul(x, broadcast(1.44269504088896341f)));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), broadcast(1.0f));
  return zero_where_less(x, broadcast(-87.33654f), scale_by_power(p, n));
}

// ln x for x >= 1, within 2 ulp of max(ln x, 2^-24); NaN where x is NaN or infinite.
LCT_INLINE Vec log_from_one(Vec x) {
  Vec mantissa, exponent;
  split_exponent(x, mantissa, exponent);
  // Bring the mantissa to [sqrt(1/2), sqrt(2)).
  const Vec above = keep_where_greater(mantissa, broadcast(1.41421356f), broadcast(1.0f));
  exponent = add(exponent, above);
  const Vec f = sub(mul(mantissa, sub(broadcast(1.0f), mul(above, broadcast(0.5f)))), broadcast(1.0f));
  const Vec square = mul(f, f);
  // Cephes' logf.
  Vec p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  Vec y = mul(mul(p, f), square);
  y = fma(exponent, broadcast(-2.12194440e-4f), y);
  y = fma(square, broadcast(-0.5f), y);
  const Vec result = fma(exponent, broadcast(0.693359375f), add(f, y));
  return add(result, sub(x, x));
}

LCT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// For its lifetime results too small for a normal float become 0: a softmax has many, and arithmetic on
// subnormals is up to twenty times slower.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#ifdef LCT_X86
  LCT_INLINE unsigned current() { return _mm_getcsr(); }
  __attribute__((always_inline)) FlushSubnormals() : before_(current()) { _mm_setcsr(before_ | 0x8000u); }
  __attribute__((always_inline)) ~FlushSubnormals() {
    // Streamed stores are made visible before the thread says that it is done.
    _mm_sfence();
    _mm_setcsr(before_);
  }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
