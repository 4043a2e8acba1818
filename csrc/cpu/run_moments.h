// Σd and Σd² of d = x − pivot over long sequences of floats, at nearly the speed of plain float sums.
//
// Moments (moments.h) widens every number to double. Here sixteen vectors are summed in registers, as floats, about the
// mean that each lane has among them, and only their three sums are widened: in a lane with mean m
//   Σ(x − pivot)  = Σ(x − m) + 16·(m − pivot)
//   Σ(x − pivot)² = Σ(x − m)² + 2·(m − pivot)·Σ(x − m) + 16·(m − pivot)²,
// whatever m is, so that its rounding does no harm. What could cancel, the terms with the pivot, is in double. Where a
// square leaves float's range the sums are not finite, and the sequence is to be summed by Moments instead.
#pragma once

#include "moments.h"

namespace irt::INPAINTRT_ISA {

constexpr int64_t kRunLength = 16;  // vectors

#if defined(__AVX512F__)
static inline Wide wide(float x) { return Wide(Vec(x)); }
static inline Wide multiply_add(Wide a, Wide b, Wide sum) {
  return {_mm512_fmadd_pd(a.low, b.low, sum.low), _mm512_fmadd_pd(a.high, b.high, sum.high)};
}
#elif defined(__AVX2__)
static inline Wide wide(float x) { return Wide(Vec(x)); }
static inline Wide multiply_add(Wide a, Wide b, Wide sum) {
  return {_mm256_fmadd_pd(a.low, b.low, sum.low), _mm256_fmadd_pd(a.high, b.high, sum.high)};
}
#else
static inline Wide wide(float x) { return Wide(static_cast<double>(x)); }
static inline Wide multiply_add(Wide a, Wide b, Wide sum) { return Wide(sum.v + a.v * b.v); }
#endif

// Adds kRunLength vectors that begin `step` elements apart.
template <class T>
IRT_INLINE void add_run(Moments& to, const T* p, int64_t step, Wide pivot) {
  Vec x[kRunLength], sums[4];
#pragma GCC unroll 16
  for (int i = 0; i < kRunLength; ++i) {
    x[i] = load(p + i * step);
    sums[i % 4] = i < 4 ? x[i] : sums[i % 4] + x[i];
  }
  const Vec mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * Vec(1.0f / kRunLength);
  Vec squares[4];
#pragma GCC unroll 16
  for (int i = 0; i < kRunLength; ++i) {
    const Vec d = x[i] - mean;
    sums[i % 4] = i < 4 ? d : sums[i % 4] + d;
    squares[i % 4] = i < 4 ? d * d : fma(d, d, squares[i % 4]);
  }
  const Wide left((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const Wide square((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const Wide away = Wide(mean) - pivot;
  const Wide all = multiply_add(away, wide(static_cast<float>(kRunLength)), left);  // Σ(x − pivot)
  to.sum = to.sum + all;
  to.squares = multiply_add(away, left + all, to.squares + square);
}

}  // namespace irt::INPAINTRT_ISA
