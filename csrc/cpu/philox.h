// Counter-based normal noise: Philox4x32-10 and Box and Muller's transform, on vectors (inpaintrt/ops/_philox.py
// defines it).
//
// A vector holds kWidth blocks, that is 4·kWidth consecutive elements. A 32 × 32 → 64 bit multiplication wants its
// operand in the low half of a 64-bit lane, so rounds run on such lanes, two registers to a vector: products are then
// used as they come, since no round reads what is above the low half. About 7 instructions an element on AVX-512.
//
// Logarithm, sine and cosine are polynomials of float32 (fitted for this, minimax): |z − exact| <= 2^-22 · max(1, r), r
// the radius, which csrc/tests/test_philox.cpp measures.
#pragma once

#include <cstdint>

#include "simd.h"

namespace irt::INPAINTRT_ISA {

// ---- of vectors, what simd.h does not have --------------------------------------------------------------------------

#if defined(__AVX512F__)
static inline bool any_other(Vec x, Vec value) { return _mm512_cmp_ps_mask(x.v, value.v, _CMP_NEQ_UQ) != 0; }
static inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x.v); }
#elif defined(__AVX2__)
static inline bool any_other(Vec x, Vec value) {  // whether a lane is not `value`
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v, value.v, _CMP_NEQ_UQ)) != 0;
}
static inline Vec square_root(Vec x) { return _mm256_sqrt_ps(x.v); }
#else
static inline bool any_other(Vec x, Vec value) { return x.v != value.v; }
static inline Vec square_root(Vec x) { return std::sqrt(x.v); }
#endif

// ---- lanes of 64 bits, of which the low half counts -----------------------------------------------------------------

#if defined(__AVX512F__)

struct Lanes64 {
  static constexpr int kWidth = 8;
  __m512i v;
  Lanes64() : v(_mm512_setzero_si512()) {}
  Lanes64(__m512i x) : v(x) {}
  Lanes64(uint64_t x) : v(_mm512_set1_epi64(static_cast<long long>(x))) {}
};
static inline Lanes64 multiply(Lanes64 a, Lanes64 b) { return _mm512_mul_epu32(a.v, b.v); }  // of the low halves
static inline Lanes64 high(Lanes64 a) { return _mm512_srli_epi64(a.v, 32); }
static inline Lanes64 exclusive_or(Lanes64 a, Lanes64 b, Lanes64 c) {
  return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96);
}
static inline Lanes64 load_lanes64(const uint64_t* p) { return _mm512_loadu_si512(p); }
static inline Lanes64 operator+(Lanes64 a, Lanes64 b) { return _mm512_add_epi64(a.v, b.v); }

using Bits = __m512i;  // kWidth lanes of 32 bits
static inline Bits interleave(Lanes64 even, Lanes64 odd) {
  return _mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32));
}
static inline Vec number(Bits x) { return _mm512_cvtepu32_ps(x); }  // unsigned, rounded to nearest even

// Positive normal u = 2^n · m with m in [√½, √2).
static inline Vec mantissa(Vec u, Vec& n) {
  const Bits bits = _mm512_sub_epi32(_mm512_castps_si512(u.v), _mm512_set1_epi32(0x3f3504f3));
  n = _mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 23));
  const Bits low = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffff));
  return _mm512_castsi512_ps(_mm512_add_epi32(low, _mm512_set1_epi32(0x3f3504f3)));
}
// (x, y) turned by `quarters` (a whole number from 0 on) right angles.
static inline void turn(Vec quarters, Vec& x, Vec& y) {
  const Bits q = _mm512_cvtps_epi32(quarters.v), two = _mm512_set1_epi32(2);
  const __mmask16 odd = _mm512_test_epi32_mask(q, _mm512_set1_epi32(1));
  const Bits minus_x = _mm512_slli_epi32(_mm512_and_si512(_mm512_add_epi32(q, _mm512_set1_epi32(1)), two), 30);
  const Bits minus_y = _mm512_slli_epi32(_mm512_and_si512(q, two), 30);
  const __m512 a = _mm512_mask_blend_ps(odd, x.v, y.v), b = _mm512_mask_blend_ps(odd, y.v, x.v);
  x = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), minus_x));
  y = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(b), minus_y));
}

// Blocks lie in the lanes of z such that this puts elements in order: lane 4L + j of z holds those of block 4j + L.
constexpr uint64_t kBlockOf[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
static inline void in_order(Vec (&z)[4]) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(z[0].v, z[1].v));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(z[2].v, z[3].v));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(z[0].v, z[1].v));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(z[2].v, z[3].v));
  z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

#elif defined(__AVX2__)

struct Lanes64 {
  static constexpr int kWidth = 4;
  __m256i v;
  Lanes64() : v(_mm256_setzero_si256()) {}
  Lanes64(__m256i x) : v(x) {}
  Lanes64(uint64_t x) : v(_mm256_set1_epi64x(static_cast<long long>(x))) {}
};
static inline Lanes64 multiply(Lanes64 a, Lanes64 b) { return _mm256_mul_epu32(a.v, b.v); }
static inline Lanes64 high(Lanes64 a) { return _mm256_srli_epi64(a.v, 32); }
static inline Lanes64 exclusive_or(Lanes64 a, Lanes64 b, Lanes64 c) {
  return _mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v);
}
static inline Lanes64 load_lanes64(const uint64_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline Lanes64 operator+(Lanes64 a, Lanes64 b) { return _mm256_add_epi64(a.v, b.v); }

using Bits = __m256i;
static inline Bits interleave(Lanes64 even, Lanes64 odd) {
  return _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xaa);
}
static inline Vec number(Bits x) {  // halves are exact, so that only their sum is rounded
  const __m256 upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  const __m256 lower = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
  return _mm256_fmadd_ps(upper, _mm256_set1_ps(65536.0f), lower);
}
static inline Vec mantissa(Vec u, Vec& n) {
  const Bits bits = _mm256_sub_epi32(_mm256_castps_si256(u.v), _mm256_set1_epi32(0x3f3504f3));
  n = _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
  const Bits low = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  return _mm256_castsi256_ps(_mm256_add_epi32(low, _mm256_set1_epi32(0x3f3504f3)));
}
static inline void turn(Vec quarters, Vec& x, Vec& y) {
  const Bits q = _mm256_cvtps_epi32(quarters.v), two = _mm256_set1_epi32(2);
  const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(q, 31));
  const Bits minus_x = _mm256_slli_epi32(_mm256_and_si256(_mm256_add_epi32(q, _mm256_set1_epi32(1)), two), 30);
  const Bits minus_y = _mm256_slli_epi32(_mm256_and_si256(q, two), 30);
  const __m256 a = _mm256_blendv_ps(x.v, y.v, odd), b = _mm256_blendv_ps(y.v, x.v, odd);
  x = _mm256_xor_ps(a, _mm256_castsi256_ps(minus_x));
  y = _mm256_xor_ps(b, _mm256_castsi256_ps(minus_y));
}

constexpr uint64_t kBlockOf[8] = {0, 2, 4, 6, 1, 3, 5, 7};
static inline void in_order(Vec (&z)[4]) {
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(z[0].v, z[1].v));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(z[2].v, z[3].v));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(z[0].v, z[1].v));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(z[2].v, z[3].v));
  z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}

#else

struct Lanes64 {
  static constexpr int kWidth = 1;
  uint64_t v;
  Lanes64() : v(0) {}
  Lanes64(uint64_t x) : v(x) {}
};
static inline Lanes64 multiply(Lanes64 a, Lanes64 b) {
  return uint64_t{static_cast<uint32_t>(a.v)} * static_cast<uint32_t>(b.v);
}
static inline Lanes64 high(Lanes64 a) { return a.v >> 32; }
static inline Lanes64 exclusive_or(Lanes64 a, Lanes64 b, Lanes64 c) { return a.v ^ b.v ^ c.v; }
static inline Lanes64 load_lanes64(const uint64_t* p) { return *p; }
static inline Lanes64 operator+(Lanes64 a, Lanes64 b) { return a.v + b.v; }

using Bits = uint32_t;
static inline Bits interleave(Lanes64 even, Lanes64) { return static_cast<uint32_t>(even.v); }
static inline Vec number(Bits x) { return static_cast<float>(x); }
static inline Vec mantissa(Vec u, Vec& n) {
  const uint32_t bits = float_to_bits(u.v) - 0x3f3504f3u;
  n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  return bits_to_float((bits & 0x7fffffu) + 0x3f3504f3u);
}
static inline void turn(Vec quarters, Vec& x, Vec& y) {
  const int q = static_cast<int>(quarters.v);
  const float a = q & 1 ? y.v : x.v, b = q & 1 ? x.v : y.v;
  x = (q + 1) & 2 ? -a : a;
  y = q & 2 ? -b : b;
}

constexpr uint64_t kBlockOf[1] = {0};
static inline void in_order(Vec (&)[4]) {}

#endif

// ---- words ----------------------------------------------------------------------------------------------------------

constexpr int kGroup = 4 * Vec::kWidth;  // elements that are made at once

// The noise of one sample: key, stream and call.
struct Philox {
  uint32_t key[2], stream, call;

  Philox(int64_t seed, uint32_t stream, uint32_t call)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        stream(stream),
        call(call) {}
};

// Words of the blocks from `first` on, kWidth of them, in the lanes that kBlockOf says.
IRT_INLINE void philox_words(const Philox& noise, int64_t first, Bits (&words)[4]) {
  constexpr int kHalves = Vec::kWidth / Lanes64::kWidth;
  const Lanes64 multiplier0(0xd2511f53u), multiplier1(0xcd9e8d57u);
  Lanes64 c[kHalves][4];
  for (int h = 0; h < kHalves; ++h) {
    uint64_t blocks[Lanes64::kWidth];
    for (int i = 0; i < Lanes64::kWidth; ++i) blocks[i] = kBlockOf[kHalves * i + h];
    const Lanes64 block = Lanes64(static_cast<uint64_t>(first)) + load_lanes64(blocks);
    c[h][0] = block;
    c[h][1] = high(block);
    c[h][2] = Lanes64(uint64_t{noise.stream});
    c[h][3] = Lanes64(uint64_t{noise.call});
  }
  uint32_t key0 = noise.key[0], key1 = noise.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes64 k0(uint64_t{key0}), k1(uint64_t{key1});
    for (int h = 0; h < kHalves; ++h) {
      const Lanes64 product0 = multiply(c[h][0], multiplier0), product1 = multiply(c[h][2], multiplier1);
      c[h][0] = exclusive_or(high(product1), c[h][1], k0);
      c[h][1] = product1;
      c[h][2] = exclusive_or(high(product0), c[h][3], k1);
      c[h][3] = product0;
    }
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  for (int w = 0; w < 4; ++w) words[w] = interleave(c[0][w], c[kHalves - 1][w]);
}

// ---- normals --------------------------------------------------------------------------------------------------------

// In [2^-33, 1]. Two roundings, of the word and of the sum: the product is exact, fused or not.
static inline Vec uniform(Bits word) { return fma(number(word), Vec(0x1p-32f), Vec(0x1p-33f)); }

// −2 ln u for u in [2^-33, 1]; exactly 0 for 1.
static inline Vec minus_two_log(Vec u) {
  Vec n;
  const Vec f = mantissa(u, n) - Vec(1.0f), t = f * f;
  Vec p = fma(f, Vec(-7.634496689e-2f), Vec(1.276157647e-1f));
  p = fma(p, f, Vec(-1.316018254e-1f));
  p = fma(p, f, Vec(1.420175731e-1f));
  p = fma(p, f, Vec(-1.662335694e-1f));
  p = fma(p, f, Vec(2.000122666e-1f));
  p = fma(p, f, Vec(-2.500081956e-1f));
  p = fma(p, f, Vec(3.333333135e-1f));
  p = fma(n, Vec(-2.12194440e-4f), p * f * t);  // ln 2 in two parts, as in exp
  p = f + fma(t, Vec(-0.5f), p);
  return Vec(-2.0f) * fma(n, Vec(0.693359375f), p);
}

// cos 2πu and sin 2πu for u in [0, 1]: right angles apart, exactly, then within an eighth of a turn.
IRT_INLINE void circle(Vec u, Vec& cosine, Vec& sine) {
  const Vec quarters = round_even(Vec(4.0f) * u);
  const Vec f = fma(quarters, Vec(-0.25f), u), t = f * f;
  Vec c = fma(t, Vec(5.922924423e1f), Vec(-8.544324493e1f));
  c = fma(c, t, Vec(6.493932343e1f));
  c = fma(c, t, Vec(-1.973920822e1f));
  cosine = fma(c, t, Vec(1.0f));
  Vec s = fma(t, Vec(-7.545339966e1f), Vec(8.159394073e1f));
  s = fma(s, t, Vec(-4.134167480e1f));
  s = fma(s, t, Vec(-1.748455603e-7f));  // what float32 leaves of 2π
  sine = fma(f, Vec(6.283185482f), f * s);
  turn(quarters, cosine, sine);
}

// The normals of kGroup elements, those of the blocks from `first` on, in order.
IRT_INLINE void philox_normals(const Philox& noise, int64_t first, Vec (&z)[4]) {
  Bits words[4];
  philox_words(noise, first, words);
  for (int pair = 0; pair < 2; ++pair) {
    const Vec radius = square_root(minus_two_log(uniform(words[2 * pair])));
    Vec cosine, sine;
    circle(uniform(words[2 * pair + 1]), cosine, sine);
    z[2 * pair] = radius * cosine;
    z[2 * pair + 1] = radius * sine;
  }
  in_order(z);
}

// The same for elements from `index` on that lie within one group: all of it with kWhole, else a part that may begin
// anywhere in it; what is beyond the group is 0.
template <bool kWhole>
IRT_INLINE void philox_normals_at(const Philox& noise, int64_t index, Vec (&z)[4]) {
  const int64_t skip = index % kGroup;
  philox_normals(noise, (index - skip) / 4, z);
  if (kWhole) return;
  float lanes[2 * kGroup] = {};
  for (int j = 0; j < 4; ++j) store(lanes + j * Vec::kWidth, z[j]);
  for (int j = 0; j < 4; ++j) z[j] = load(lanes + skip + j * Vec::kWidth);
}

}  // namespace irt::INPAINTRT_ISA
