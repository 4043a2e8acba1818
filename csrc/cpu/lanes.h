// The operands of a product (gemm.h): what a 32-bit lane of them holds, and how tensors are read into lanes.
//
// Usually a lane is a float, whatever the dtype of the tensor. AVX512_BF16 multiplies pairs: there a lane of bf16 data
// holds two neighbouring channels, the first in its low half, and products run at twice the rate on half the memory. A
// channel that the last pair lacks is 0 in both operands.
//
// What VDPBF16PS computes: sum + a0·b0 + a1·b1 with float sums and exact products, rounded to nearest even whatever the
// caller has set, subnormal operands and results taken as 0. Whether the two products are added one by one (as Intel
// documents, the second first) or at once is the CPU's choice, so the last bit of a sum may differ between CPUs; the
// error bound of a float sum of as many products holds either way.
#pragma once

#include <type_traits>

#include "simd.h"

namespace irt::INPAINTRT_ISA {

struct Single {
  static constexpr int kChannels = 1;  // per lane

  static Vec multiply_add(Vec a, Vec b, Vec sums) { return fma(a, b, sums); }

  // One vector of lanes of one pixel: n channels, of which some may be missing at the end.
  template <class T>
  static Vec across(const T* p, int64_t n, int64_t stride) {
    return n == Vec::kWidth && stride == 1 ? load(p) : load_some(p, n, stride);
  }
  // Likewise of floats that are meant as bf16.
  static Vec across_rounded(const float* p, int64_t n, int64_t stride) { return round_to_bf16(across(p, n, stride)); }
  // One lane of kWidth adjacent pixels.
  template <class T>
  static Vec down(const T* p, int64_t, int64_t) {
    return load(p);
  }
  // Lanes of the channels 0, 2, 4 …, and 1, 3, 5 … where a lane holds two.
  static Vec pack(Vec even, Vec) { return even; }
  static Vec times(Vec a, Vec b) { return a * b; }
  static Vec even(Vec v) { return v; }
  static Vec odd(Vec) { return Vec(0.0f); }
};

#if defined(__AVX512BF16__)

struct Pair {
  static constexpr int kChannels = 2;

  static Vec multiply_add(Vec a, Vec b, Vec sums) {
    return _mm512_dpbf16_ps(sums.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
  }
  static Vec across(const bf16* p, int64_t n, int64_t stride) {
    if (n == 2 * Vec::kWidth && stride == 1) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
    alignas(64) bf16 channels[2 * Vec::kWidth] = {};
    for (int64_t i = 0; i < n; ++i) channels[i] = p[i * stride];
    return _mm512_castsi512_ps(_mm512_load_si512(channels));
  }
  static Vec across_rounded(const float* p, int64_t n, int64_t stride) {
    if (n == 2 * Vec::kWidth && stride == 1) {
      const __m512bh both = _mm512_cvtne2ps_pbh(load(p + Vec::kWidth).v, load(p).v);
      return _mm512_castsi512_ps(reinterpret_cast<__m512i>(both));
    }
    bf16 channels[2 * Vec::kWidth];
    for (int64_t i = 0; i < n; ++i) from_float(p[i * stride], channels[i]);
    return across(channels, n, 1);
  }
  static Vec down(const bf16* p, int64_t n, int64_t stride) {  // n channels are left
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(load(p).v), 16);
    return n > 1 ? _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(load(p + stride).v)))
                 : _mm512_castsi512_ps(low);
  }
  static Vec pack(Vec even, Vec odd) {
    const __m512i low = rounded(even), high = _mm512_slli_epi32(rounded(odd), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
  }
  static Vec times(Vec a, Vec b) { return pack(even(a) * even(b), odd(a) * odd(b)); }
  // The channels of a lane as floats.
  static Vec even(Vec v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v.v), 16)); }
  static Vec odd(Vec v) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v.v), _mm512_set1_epi32(-65536)));
  }

 private:
  static __m512i rounded(Vec v) {  // bf16 in the low half of each lane
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.v)));
  }
};

template <class T>
using LaneOf = std::conditional_t<std::is_same_v<std::remove_const_t<T>, bf16>, Pair, Single>;

#else

template <class T>
using LaneOf = Single;

#endif

}  // namespace irt::INPAINTRT_ISA
