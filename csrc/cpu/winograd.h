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

// Six points 0, ±3/4, ±3/2, ∞: exact in binary and closer together than the textbook's 0, ±1, ±2, ∞, which halves the
// RMS error and quarters the largest. What error remains is cancellation in the products' sums, which no care in here
// could remove.
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kAtA = 2 * kA2 * (kA2 - kB2), kAtB = 2 * kB2 * (kB2 - kA2), kAtZero = kA2 * kB2;  // Π(p_i − p_j)

IRT_INLINE void six_inputs(const Vec (&d)[6], Vec (&t)[6]) {
  const Vec sum(-(kA2 + kB2)), product(kA2 * kB2);
  t[0] = fma(product, d[0], fma(sum, d[2], d[4]));
  t[5] = fma(product, d[1], fma(sum, d[3], d[5]));
  const Vec even_a = fma(Vec(-kB2), d[2], d[4]), odd_a = fma(Vec(-kB2), d[1], d[3]);
  const Vec even_b = fma(Vec(-kA2), d[2], d[4]), odd_b = fma(Vec(-kA2), d[1], d[3]);
  t[1] = fma(Vec(kA), odd_a, even_a);
  t[2] = fma(Vec(-kA), odd_a, even_a);
  t[3] = fma(Vec(kB), odd_b, even_b);
  t[4] = fma(Vec(-kB), odd_b, even_b);
}

// Four outputs of three taps.
struct F43 {
  static constexpr int kOutputs = 4, kTaps = 3, kInputs = 6;

  IRT_INLINE void input(const Vec (&d)[6], Vec (&t)[6]) { six_inputs(d, t); }
  IRT_INLINE void filter(const Vec (&g)[3], Vec (&t)[6]) {
    t[0] = g[0] * Vec(1 / kAtZero);
    const Vec even_a = fma(g[2], Vec(kA2 / kAtA), g[0] * Vec(1 / kAtA)), odd_a = g[1] * Vec(kA / kAtA);
    const Vec even_b = fma(g[2], Vec(kB2 / kAtB), g[0] * Vec(1 / kAtB)), odd_b = g[1] * Vec(kB / kAtB);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }
  IRT_INLINE void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = fma(Vec(kB), odd_b, odd_a * Vec(kA));
    y[2] = fma(Vec(kB2), even_b, even_a * Vec(kA2));
    y[3] = fma(Vec(kB2 * kB), odd_b, fma(Vec(kA2 * kA), odd_a, m[5]));
  }
};

// Two outputs of five taps, at the same points.
struct F25 {
  static constexpr int kOutputs = 2, kTaps = 5, kInputs = 6;

  IRT_INLINE void input(const Vec (&d)[6], Vec (&t)[6]) { six_inputs(d, t); }
  IRT_INLINE void filter(const Vec (&g)[5], Vec (&t)[6]) {
    const auto at = [&](float square, float over, Vec& even, Vec& odd, float point) {
      even = fma(g[4], Vec(square * square / over), fma(g[2], Vec(square / over), g[0] * Vec(1 / over)));
      odd = fma(g[3], Vec(square * point / over), g[1] * Vec(point / over));
    };
    Vec even_a, odd_a, even_b, odd_b;
    at(kA2, kAtA, even_a, odd_a, kA);
    at(kB2, kAtB, even_b, odd_b, kB);
    t[0] = g[0] * Vec(1 / kAtZero);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[4];
  }
  IRT_INLINE void output(const Vec (&m)[6], Vec (&y)[2]) {
    const Vec odd_a = m[1] - m[2], odd_b = m[3] - m[4];
    y[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
    y[1] = fma(Vec(kB), odd_b, fma(Vec(kA), odd_a, m[5]));
  }
};

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
