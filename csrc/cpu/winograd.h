// Winograd's F(4×4, 3×3): sixteen outputs of a 3×3 convolution from 36 products instead of 144, per channel pair.
//
// One dimension: with the points 0, ±a, ±b, ∞ a polynomial of degree 5 is known, so that
//
//   y = Aᵀ[(G g) ∘ (Bᵀ d)]   d: 6 inputs, g: 3 taps, y: 4 outputs
//
// and two dimensions nest the same. (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016;
// Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2018, for the choice of
// points.) a = 3/4 and b = 3/2 are exact in binary and closer together than the textbook's 1 and 2: half the RMS error
// and a quarter of the largest. What error remains is cancellation in the products' sums, which no care in here could
// remove.
#pragma once

#include "simd.h"

namespace irt::INPAINTRT_ISA::winograd {

constexpr int kOutputs = 4, kInputs = 6, kPoints = kInputs * kInputs;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// Bᵀ: the values of Π(x − p_j), j ≠ i, weighted by the inputs as powers of x.
static inline void transform_input(const Vec (&d)[6], Vec (&t)[6]) {
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

// G: the taps as a polynomial, at the points, over Π(p_i − p_j).
static inline void transform_filter(const Vec (&g)[3], Vec (&t)[6]) {
  constexpr float at_a = 2 * kA2 * (kA2 - kB2), at_b = 2 * kB2 * (kB2 - kA2);
  t[0] = g[0] * Vec(1 / (kA2 * kB2));
  const Vec even_a = fma(g[2], Vec(kA2 / at_a), g[0] * Vec(1 / at_a)), odd_a = g[1] * Vec(kA / at_a);
  const Vec even_b = fma(g[2], Vec(kB2 / at_b), g[0] * Vec(1 / at_b)), odd_b = g[1] * Vec(kB / at_b);
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = g[2];
}

// Aᵀ: the values at the points, weighted by powers of the points.
static inline void transform_output(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + (even_a + even_b);
  y[1] = fma(Vec(kB), odd_b, odd_a * Vec(kA));
  y[2] = fma(Vec(kB2), even_b, even_a * Vec(kA2));
  y[3] = fma(Vec(kB2 * kB), odd_b, fma(Vec(kA2 * kA), odd_a, m[5]));
}

// The 2-D transforms: one dimension after the other. `get(i, j)` reads the element of row i and column j, `put` takes
// it.
template <int kIn, int kOut, class Transform, class Get, class Put>
static inline void transform_2d(const Transform& transform, const Get& get, const Put& put) {
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
