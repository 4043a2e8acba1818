// One vector of floats per ISA, and the few elementary functions that inpainting's epilogues need.
//
// `Vec` has kWidth lanes: 16 (AVX-512), 8 (AVX2 + FMA + F16C) or 1 (any x86-64). Kernels are written once against it.
// Storage types f16 and bf16 are converted on load and store; arithmetic is always float.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Vectors live in registers only where the compiler sees that nobody else holds them: what takes them by reference must
// be part of its caller.
#define IRT_INLINE __attribute__((always_inline)) static inline

namespace irt::INPAINTRT_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// ---- scalar conversions (tails, gathers, the scalar ISA) ----------------------------------------------------------

static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  const uint32_t quiet = rest > 0x7c00u ? 0x400000u : 0;  // infinity has no payload, NaN becomes a quiet one
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | quiet);
  if (rest >= 0x400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: a multiple of 2^-24
  return sign ? -small : small;
#endif
}

static inline void from_float(float x, float& out) { out = x; }
static inline void from_float(float x, bf16& out) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(u >> 16 | 0x40u);  // NaN stays NaN
  } else {
    out.bits = static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);  // round to nearest even
  }
}
static inline void from_float(float x, f16& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = float_to_bits(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t mag = u & 0x7fffffffu;
  uint32_t half;
  if (mag > 0x7f800000u) {
    half = 0x7e00u | (mag >> 13 & 0x3ffu);
  } else if (mag >= 0x477ff000u) {  // rounds to 65520 or more: infinity
    half = 0x7c00u;
  } else if (mag >= 0x38800000u) {  // normal
    const uint32_t shifted = mag - 0x38000000u;
    half = (shifted + 0xfffu + (shifted >> 13 & 1u)) >> 13;
  } else {  // subnormal: the addition rounds to a multiple of 2^-24
    half = float_to_bits(bits_to_float(mag) + 0.5f) - 0x3f000000u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// ---- the vector ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
  Vec() : v(_mm512_setzero_ps()) {}
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
};
static inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
static inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
static inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
static inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// NaN in `x` survives: the second operand of min/max is returned when either is NaN.
static inline Vec at_least(Vec low, Vec x) { return _mm512_max_ps(low.v, x.v); }
static inline Vec at_most(Vec high, Vec x) { return _mm512_min_ps(high.v, x.v); }
static inline Vec if_positive(Vec x, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), no.v, yes.v);
}
static inline Vec if_at_most_zero(Vec x, Vec yes, Vec no) {  // NaN takes `no`
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LE_OQ), no.v, yes.v);
}
static inline bool any_from(Vec x, Vec low) {  // whether a lane is at least `low`, or NaN
  return _mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ) != 0;
}
static inline Vec round_even(Vec x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x.v, n.v); }  // x · 2^n, any n

static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
static inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(f16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Not VCVTNEPS2BF16, where the CPU has it: that makes subnormals 0, and bits would depend on the instruction set.
static inline __m512i bf16_bits(Vec x) {  // in the upper half of each lane
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
}
static inline void store(bf16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)));
}
static inline Vec round_to_bf16(Vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), _mm512_set1_epi32(-65536)));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  Vec() : v(_mm256_setzero_ps()) {}
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
};
static inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
static inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
static inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
static inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
static inline Vec at_least(Vec low, Vec x) { return _mm256_max_ps(low.v, x.v); }
static inline Vec at_most(Vec high, Vec x) { return _mm256_min_ps(high.v, x.v); }
static inline Vec if_positive(Vec x, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ));
}
static inline Vec if_at_most_zero(Vec x, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LE_OQ));
}
static inline bool any_from(Vec x, Vec low) { return _mm256_movemask_ps(_mm256_cmp_ps(x.v, low.v, _CMP_NLT_UQ)) != 0; }
static inline Vec round_even(Vec x) { return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// x · 2^n for |n| <= 252, in two steps so that 2^n itself may overflow
static inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(x.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
static inline Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline void store(f16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline __m256i bf16_bits(Vec x) {  // in the upper half of each lane
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
static inline void store(bf16* p, Vec x) {
  const __m256i out = _mm256_srli_epi32(bf16_bits(x), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
static inline Vec round_to_bf16(Vec x) {
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x), _mm256_set1_epi32(-65536)));
}

#else

struct Vec {
  static constexpr int kWidth = 1;
  float v;
  Vec() : v(0.0f) {}
  Vec(float x) : v(x) {}
};
static inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
static inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
static inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
static inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
static inline Vec at_least(Vec low, Vec x) { return low.v > x.v ? low.v : x.v; }
static inline Vec at_most(Vec high, Vec x) { return high.v < x.v ? high.v : x.v; }
static inline Vec if_positive(Vec x, Vec yes, Vec no) { return x.v > 0.0f ? yes.v : no.v; }
static inline Vec if_at_most_zero(Vec x, Vec yes, Vec no) { return x.v <= 0.0f ? yes.v : no.v; }
static inline bool any_from(Vec x, Vec low) { return !(x.v < low.v); }
static inline Vec round_even(Vec x) {
  const float shift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, for |x| < 2^22
  return std::fabs(x.v) < 4194304.0f ? (x.v + shift) - shift : x.v;
}
static inline Vec scale_by_power(Vec x, Vec n) {
  if (!(n.v == n.v)) return n.v;
  const int whole = static_cast<int>(n.v), half = whole >> 1;
  return x.v * bits_to_float(static_cast<uint32_t>(half + 127) << 23) *
         bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
}
static inline Vec load(const float* p) { return *p; }
static inline void store(float* p, Vec x) { *p = x.v; }
static inline Vec load(const f16* p) { return to_float(*p); }
static inline void store(f16* p, Vec x) { from_float(x.v, *p); }
static inline Vec load(const bf16* p) { return to_float(*p); }
static inline void store(bf16* p, Vec x) { from_float(x.v, *p); }
static inline Vec round_to_bf16(Vec x) {
  bf16 rounded;
  from_float(x.v, rounded);
  return to_float(rounded);
}

#endif

// kWidth vectors as a square matrix, transposed in place: how channels that lie apart become the lanes of a vector.
#if defined(__AVX512F__)
IRT_INLINE void transpose(Vec (&rows)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // 128-bit lane L of u[i + c] then holds column 4L + c of rows i to i + 3
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(t[i + k]), high = _mm512_castps_pd(t[i + 2 + k]);
      u[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // gather the lanes of the four groups of rows
    const __m512 even_low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
#elif defined(__AVX2__)
IRT_INLINE void transpose(Vec (&rows)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // 128-bit lane L of u[i + c] then holds column 4L + c of rows i to i + 3
    for (int k = 0; k < 2; ++k) {
      const __m256d low = _mm256_castps_pd(t[i + k]), high = _mm256_castps_pd(t[i + 2 + k]);
      u[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      u[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
#else
IRT_INLINE void transpose(Vec (&)[1]) {}
#endif

// The first n (<= kWidth) lanes; the rest is zero. Strided forms serve layouts whose inner dimension is not contiguous.
template <class T>
static inline Vec load_some(const T* p, int64_t n, int64_t stride = 1) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else if (stride == 1) {
    alignas(32) T some[Vec::kWidth];
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    _mm256_store_si256(reinterpret_cast<__m256i*>(some), bits);
    return load(some);
  }
#endif
  alignas(64) float lanes[Vec::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}
template <class T>
static inline void store_some(T* p, Vec x, int64_t n, int64_t stride = 1) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
  } else if (stride == 1) {
    alignas(32) T some[Vec::kWidth];
    store(some, x);
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
#endif
  alignas(64) float lanes[Vec::kWidth];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) from_float(lanes[i], p[i * stride]);
}

// ---- elementary functions -----------------------------------------------------------------------------------------

// x = n·ln2 + r with |r| <= ln2/2; returns e^r − 1 by its Taylor series (degree 8: truncation below 2^-29 relative).
// The clamp keeps 2^n·p finite where 2^n is not (n = 128, from x = 88.4 on), so that overflow is +inf, never inf − inf.
static inline Vec reduced_expm1(Vec x, Vec& n) {
  x = at_most(Vec(89.0f), at_least(Vec(-104.0f), x));
  n = round_even(x * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), x);  // Cody–Waite: the first part of ln 2 has 9 bits, so n·it is exact
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec q = fma(r, Vec(2.4801587e-5f), Vec(1.9841270e-4f));
  q = fma(q, r, Vec(1.3888889e-3f));
  q = fma(q, r, Vec(8.3333333e-3f));
  q = fma(q, r, Vec(4.1666667e-2f));
  q = fma(q, r, Vec(1.6666667e-1f));
  q = fma(q, r, Vec(0.5f));
  return fma(q * r, r, r);
}

static inline Vec exp(Vec x) {
  Vec n;
  const Vec p = reduced_expm1(x, n);
  return scale_by_power(p + Vec(1.0f), n);
}

// e^x − 1 with a relative error of a few ulp up to x = 88.37, near 0 too: 2^n·p + (2^n − 1). From there on, where 2^n
// alone overflows, it is +inf; the activations go no further than x = 20. NaN in gives NaN out.
static inline Vec expm1(Vec x) {
  Vec n;
  const Vec p = reduced_expm1(x, n);
  return scale_by_power(p, n) + (scale_by_power(Vec(1.0f), n) - Vec(1.0f));
}

// For gates and SiLU: exact limits (0 at −inf, 1 at +inf), NaN kept.
static inline Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp(Vec(0.0f) - x)); }

// e/(e + 2) with e = e^{2x} − 1; |x| is clamped where float's tanh is 1.
static inline Vec tanh(Vec x) {
  const Vec e = expm1(at_most(Vec(10.0f), at_least(Vec(-10.0f), x)) * Vec(2.0f));
  return e / (e + Vec(2.0f));
}

}  // namespace irt::INPAINTRT_ISA
