// Mean and sum of squared deviations of long sequences of floats, in one pass.
//
// Σd and Σd² of d = x − pivot, in double, where the pivot is one of the sequence's own numbers. With a pivot that is
// not, like 0, Σd² − (Σd)²/n can lose everything: 10⁸ + 10⁻⁴ for numbers like 10⁴ ± 0.01. The deviation of a member is
// part of what is left, so here at most log2(n) of double's 53 bits cancel; and a constant sequence has exactly 0.
#pragma once

#include "simd.h"

namespace irt::INPAINTRT_ISA {

// kWidth doubles.
#if defined(__AVX512F__)
struct Wide {
  __m512d low, high;
  Wide() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}
  Wide(__m512d a, __m512d b) : low(a), high(b) {}
  explicit Wide(Vec x)
      : low(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v))),
        high(_mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_shuffle_f32x4(x.v, x.v, 0xee)))) {}
};
static inline Wide operator+(Wide a, Wide b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
static inline Wide operator-(Wide a, Wide b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
static inline Wide plus_square(Wide sum, Wide x) {
  return {_mm512_fmadd_pd(x.low, x.low, sum.low), _mm512_fmadd_pd(x.high, x.high, sum.high)};
}
static inline Wide load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
static inline void store(double* p, Wide x) {
  _mm512_storeu_pd(p, x.low);
  _mm512_storeu_pd(p + 8, x.high);
}
#elif defined(__AVX2__)
struct Wide {
  __m256d low, high;
  Wide() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}
  Wide(__m256d a, __m256d b) : low(a), high(b) {}
  explicit Wide(Vec x)
      : low(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))), high(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))) {}
};
static inline Wide operator+(Wide a, Wide b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
static inline Wide operator-(Wide a, Wide b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
static inline Wide plus_square(Wide sum, Wide x) {
  return {_mm256_fmadd_pd(x.low, x.low, sum.low), _mm256_fmadd_pd(x.high, x.high, sum.high)};
}
static inline Wide load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
static inline void store(double* p, Wide x) {
  _mm256_storeu_pd(p, x.low);
  _mm256_storeu_pd(p + 4, x.high);
}
#else
struct Wide {
  double v = 0.0;
  Wide() = default;
  explicit Wide(double x) : v(x) {}
  explicit Wide(Vec x) : v(static_cast<double>(x.v)) {}
};
static inline Wide operator+(Wide a, Wide b) { return Wide(a.v + b.v); }
static inline Wide operator-(Wide a, Wide b) { return Wide(a.v - b.v); }
static inline Wide plus_square(Wide sum, Wide x) { return Wide(sum.v + x.v * x.v); }
static inline Wide load(const double* p) { return Wide(*p); }
static inline void store(double* p, Wide x) { *p = x.v; }
#endif

// Of kWidth sequences, one a lane. A lane that is given its pivot is as good as left out.
struct Moments {
  Wide sum, squares;

  void add(Vec x, Wide pivot) {
    const Wide d = Wide(x) - pivot;
    sum = sum + d;
    squares = plus_square(squares, d);
  }
};

// Of one sequence of n numbers, from Σd and Σd². The deviation is the unbiased one: NaN of a single number.
struct Spread {
  double mean, deviation;

  Spread(double pivot, double sum, double squares, int64_t n) {
    const double count = static_cast<double>(n), left = squares - sum * (sum / count);
    mean = pivot + sum / count;
    deviation = std::sqrt((left < 0.0 ? 0.0 : left) / (count - 1.0));
  }
};

}  // namespace irt::INPAINTRT_ISA
