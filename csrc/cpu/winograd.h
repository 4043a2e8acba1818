// Winograd's F(m×m, r×r): m² outputs of an r×r convolution from (m + r − 1)² products instead of m²·r², per channel
// pair.
//
// One dimension, with n = m + r − 1 points of which the last is ∞: a polynomial of degree n − 1 is known by its values
// at them, so that
//
//   y = Aᵀ[(G g) ∘ (Bᵀ d)]   d: n inputs, g: r taps, y: m outputs
//
// and two dimensions nest the same. (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016;
// Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2018, for the choice of
// points.) Bᵀ depends on the points alone: the values of Π(x − p_j), j ≠ i, with the inputs as coefficients; G has the
// taps as a polynomial at the points, over Π(p_i − p_j); Aᵀ weighs the values by powers of the points.
#pragma once

#include "simd.h"

namespace irt::INPAINTRT_ISA::winograd {

// Points 0, ±p and ∞, for each p of a set. All are exact in binary.
//
// Six: closer together than the textbook's 0, ±1, ±2, ∞, which halves the RMS error and quarters the largest. What
// error remains is cancellation in the products' sums, which no care in here could remove.
struct SixPoints {
  static constexpr int kPairs = 2;
  static constexpr float at[kPairs] = {0.75f, 1.5f};
};
// Eight, for one dimension only: the best of all multiples of 1/4 up to 5/2.
struct EightPoints {
  static constexpr int kPairs = 3;
  static constexpr float at[kPairs] = {0.5f, 1.0f, 2.0f};
};

// The weights of m outputs of r taps at a set of points. Polynomials are split into their even and odd parts, which p
// and −p share: they are polynomials in p².
template <int m, int r, class Points>
struct FormWeights {
  static constexpr int kPairs = Points::kPairs, kMost = m > r ? m : r;
  float all[kPairs + 1] = {};           // Π(x − p_j²): its coefficients, rising
  float rest[kPairs][kPairs + 1] = {};  // likewise, without p_i²
  float zero = 1;                       // 1 / Π(p_i − p_j) for p_i = 0
  float tap[kMost][kPairs] = {};        // p_i^k / Π(p_i − p_j)
  float power[kMost][kPairs] = {};      // p_i^k

  constexpr FormWeights() {
    multiply(-1, all);
    zero = 1 / all[0];
    for (int i = 0; i < kPairs; ++i) {
      const float p = Points::at[i];
      multiply(i, rest[i]);
      float at = 0;
      for (int k = kPairs; k >= 0; --k) at = at * p * p + rest[i][k];
      for (int k = 0; k < kMost; ++k) {
        power[k][i] = k ? power[k - 1][i] * p : 1;
        tap[k][i] = power[k][i] / (2 * p * p * at);
      }
    }
  }

 private:
  static constexpr void multiply(int without, float (&product)[kPairs + 1]) {
    product[0] = 1;
    for (int j = 0; j < kPairs; ++j) {
      if (j == without) continue;
      const float root = Points::at[j] * Points::at[j];
      for (int k = kPairs; k > 0; --k) product[k] = product[k - 1] - root * product[k];
      product[0] *= -root;
    }
  }
};

// m outputs of r taps.
template <int m, int r, class Points>
struct Form {
  static constexpr int kOutputs = m, kTaps = r, kInputs = m + r - 1, kPairs = Points::kPairs;
  static_assert(kInputs == 2 * kPairs + 2);

  IRT_INLINE void input(const Vec (&d)[kInputs], Vec (&t)[kInputs]) {
    t[0] = weigh<kPairs>(kWeights.all, d);
    t[kInputs - 1] = weigh<kPairs>(kWeights.all, d + 1);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const Vec even = weigh<kPairs - 1>(kWeights.rest[i], d + 2), odd = weigh<kPairs - 1>(kWeights.rest[i], d + 1);
      t[1 + 2 * i] = fma(Vec(Points::at[i]), odd, even);
      t[2 + 2 * i] = fma(Vec(-Points::at[i]), odd, even);
    }
  }
  IRT_INLINE void filter(const Vec (&g)[r], Vec (&t)[kInputs]) {
    t[0] = g[0] * Vec(kWeights.zero);
    t[kInputs - 1] = g[r - 1];
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      Vec sums[2] = {g[0] * Vec(kWeights.tap[0][i]), g[1] * Vec(kWeights.tap[1][i])};  // of even and odd taps
#pragma GCC unroll 8
      for (int k = 2; k < r; ++k) sums[k % 2] = fma(g[k], Vec(kWeights.tap[k][i]), sums[k % 2]);
      t[1 + 2 * i] = sums[0] + sums[1];
      t[2 + 2 * i] = sums[0] - sums[1];
    }
  }
  IRT_INLINE void output(const Vec (&v)[kInputs], Vec (&y)[m]) {
    Vec parts[2][kPairs];  // even and odd
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      parts[0][i] = v[1 + 2 * i] + v[2 + 2 * i], parts[1][i] = v[1 + 2 * i] - v[2 + 2 * i];
    }
    Vec sum = parts[0][0];
#pragma GCC unroll 4
    for (int i = 1; i < kPairs; ++i) sum = sum + parts[0][i];
    y[0] = v[0] + sum;
#pragma GCC unroll 8
    for (int k = 1; k < m; ++k) {
      const Vec first(kWeights.power[k][0]);
      y[k] = k == m - 1 ? fma(first, parts[k % 2][0], v[kInputs - 1]) : parts[k % 2][0] * first;
#pragma GCC unroll 4
      for (int i = 1; i < kPairs; ++i) y[k] = fma(Vec(kWeights.power[k][i]), parts[k % 2][i], y[k]);
    }
  }

 private:
  static constexpr FormWeights<m, r, Points> kWeights{};

  // Every second input, by a polynomial whose leading coefficient is 1.
  template <int kDegree>
  IRT_INLINE Vec weigh(const float (&by)[kPairs + 1], const Vec* d) {
    Vec sum = d[2 * kDegree];
#pragma GCC unroll 4
    for (int i = kDegree - 1; i >= 0; --i) sum = fma(Vec(by[i]), d[2 * i], sum);
    return sum;
  }
};

using F43 = Form<4, 3, SixPoints>;
using F25 = Form<2, 5, SixPoints>;
using F45 = Form<4, 5, EightPoints>;
using F27 = Form<2, 7, EightPoints>;

// Four outputs of two taps, at ±1/2, ±5/4, ∞: of all multiples of 1/8 up to 5/2 those with the least largest error,
// which is below F43's. The factors 1/Π(p_i − p_j) are with the outputs, so that a filter of one tap has the same value
// at all points but ∞.
struct F42 {
  static constexpr int kOutputs = 4, kTaps = 2, kInputs = 5;
  static constexpr float kNear = 0.5f, kFar = 1.25f, kNear2 = kNear * kNear, kFar2 = kFar * kFar;

  IRT_INLINE void input(const Vec (&d)[5], Vec (&t)[5]) {
    const Vec even_near = fma(Vec(-kFar2), d[0], d[2]), odd_near = fma(Vec(-kFar2), d[1], d[3]);
    const Vec even_far = fma(Vec(-kNear2), d[0], d[2]), odd_far = fma(Vec(-kNear2), d[1], d[3]);
    t[0] = fma(Vec(kNear), even_near, odd_near);
    t[1] = fma(Vec(-kNear), even_near, odd_near);
    t[2] = fma(Vec(kFar), even_far, odd_far);
    t[3] = fma(Vec(-kFar), even_far, odd_far);
    t[4] = fma(Vec(kNear2 * kFar2), d[0], fma(Vec(-(kNear2 + kFar2)), d[2], d[4]));
  }
  IRT_INLINE void filter(const Vec (&g)[2], Vec (&t)[5]) {
    constexpr float kAll = 1 / (2 * kNear * kFar * (kNear2 - kFar2));  // common to the four factors
    const Vec even = g[0] * Vec(kAll), odd = g[1] * Vec(kAll);
    t[0] = fma(Vec(kNear), odd, even);
    t[1] = fma(Vec(-kNear), odd, even);
    t[2] = fma(Vec(kFar), odd, even);
    t[3] = fma(Vec(-kFar), odd, even);
    t[4] = g[1];
  }
  IRT_INLINE void output(const Vec (&m)[5], Vec (&y)[4]) {
    constexpr float kBoth = kNear * kFar;  // what is left of the factors: ±kFar at ±1/2, ∓kNear at ±5/4
    const Vec even_near = m[0] - m[1], odd_near = m[0] + m[1], even_far = m[2] - m[3], odd_far = m[2] + m[3];
    y[0] = fma(Vec(-kNear), even_far, even_near * Vec(kFar));
    y[1] = (odd_near - odd_far) * Vec(kBoth);
    y[2] = fma(Vec(-kBoth * kFar), even_far, even_near * Vec(kBoth * kNear));
    y[3] = fma(Vec(-kBoth * kFar2), odd_far, fma(Vec(kBoth * kNear2), odd_near, m[4]));
  }
};

// Two outputs of three taps, at 0, ±1, ∞: half the gain of F43, and no more rounding error than the direct form.
struct F23 {
  static constexpr int kOutputs = 2, kTaps = 3, kInputs = 4;

  IRT_INLINE void input(const Vec (&d)[4], Vec (&t)[4]) {
    t[0] = d[2] - d[0];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  IRT_INLINE void filter(const Vec (&g)[3], Vec (&t)[4]) {
    const Vec even = (g[0] + g[2]) * Vec(0.5f), odd = g[1] * Vec(0.5f);
    t[0] = Vec(0.0f) - g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }
  IRT_INLINE void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

// A transform in two dimensions, one after the other. `get(i, j)` reads the element of row i and column j, `put` takes
// it.
template <int kIn, int kOut, class Transform, class Get, class Put>
IRT_INLINE void transform_2d(const Transform& transform, const Get& get, const Put& put) {
  Vec half[kOut][kIn];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) {
    Vec column[kIn], result[kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) column[i] = get(i, j);
    transform(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < kOut; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    Vec result[kOut];
    transform(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; ++j) put(i, j, result[j]);
  }
}

}  // namespace irt::INPAINTRT_ISA::winograd
