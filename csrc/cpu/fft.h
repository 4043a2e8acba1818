// Complex discrete Fourier transforms of any length, unscaled, of kWidth independent signals at once.
//
// The lanes of a vector are channels, so no element ever moves between lanes and one program serves every length:
// element i of the signals lies at re[i · kWidth], im[i · kWidth]. The inverse transform is the same call with re and
// im exchanged on both sides.
//
// Self-sorting mixed radix (Stockham): every pass reads one buffer and writes the other, and no bit reversal is needed.
// A pass of radix R over sub-transforms of length n = R·m with stride s computes
//
//   y[q + s(R·j + k)] = w_n^(j·k) · Σ_p x[q + s(j + m·p)] · w_R^(p·k)        0 ≤ j < m, 0 ≤ q < s, w_n = e^(−2πi/n)
//
// Butterflies of 2, 4 and 8 are written out; odd radices use the symmetry of cosine and sine (a quarter of the dense
// work). A length with a prime factor above kLargestRadix is computed as a convolution with a chirp (Bluestein), whose
// transforms have lengths of the first kind.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace irt::INPAINTRT_ISA {

struct Complex {
  Vec re, im;
};
static inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
static inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
static inline Complex minus_i(Complex a) { return {a.im, Vec(0.0f) - a.re}; }
static inline Complex operator*(Complex a, Complex w) {
  return {fma(a.re, w.re, Vec(0.0f) - a.im * w.im), fma(a.re, w.im, a.im * w.re)};
}

struct Planes {  // where signals lie: the real and the imaginary parts of element 0
  float *re, *im;
  Complex get(int64_t i) const { return {load(re + i * Vec::kWidth), load(im + i * Vec::kWidth)}; }
  void put(int64_t i, Complex x) const {
    store(re + i * Vec::kWidth, x.re);
    store(im + i * Vec::kWidth, x.im);
  }
  Planes exchanged() const { return {im, re}; }
};

// ---- butterflies: R values in, their transform out
// -------------------------------------------------------------------

static inline void butterfly(Complex (&x)[2], const float*) {
  const Complex a = x[0], b = x[1];
  x[0] = a + b;
  x[1] = a - b;
}

static inline void butterfly(Complex (&x)[4], const float*) {
  const Complex even = x[0] + x[2], odd = x[1] + x[3], a = x[0] - x[2], b = minus_i(x[1] - x[3]);
  x[0] = even + odd;
  x[1] = a + b;
  x[2] = even - odd;
  x[3] = a - b;
}

static inline void butterfly(Complex (&x)[8], const float*) {
  Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
  butterfly(even, nullptr);
  butterfly(odd, nullptr);
  const Vec r(0.70710678118654752f);
  odd[1] = {(odd[1].re + odd[1].im) * r, (odd[1].im - odd[1].re) * r};
  odd[2] = minus_i(odd[2]);
  odd[3] = {(odd[3].im - odd[3].re) * r, Vec(0.0f) - (odd[3].re + odd[3].im) * r};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    x[k] = even[k] + odd[k];
    x[k + 4] = even[k] - odd[k];
  }
}

// Odd R. `table`: for k, p in 1…R/2, cos(2πkp/R) then sin(2πkp/R).
template <int kMost>
static inline void odd_butterfly(Complex (&x)[kMost], const float* table, int radix) {
  const int half = radix / 2;
  Complex sums[kMost / 2], differences[kMost / 2], first = x[0];
#pragma GCC unroll 4
  for (int p = 0; p < half; ++p) {
    sums[p] = x[1 + p] + x[radix - 1 - p];
    differences[p] = x[1 + p] - x[radix - 1 - p];
    first = first + sums[p];
  }
#pragma GCC unroll 4
  for (int k = 0; k < half; ++k) {
    Complex a = x[0], b = {};
#pragma GCC unroll 4
    for (int p = 0; p < half; ++p, table += 2) {
      const Vec cosine(table[0]), sine(table[1]);
      a = {fma(cosine, sums[p].re, a.re), fma(cosine, sums[p].im, a.im)};
      b = {fma(sine, differences[p].re, b.re), fma(sine, differences[p].im, b.im)};
    }
    b = minus_i(b);
    x[1 + k] = a + b;
    x[radix - 1 - k] = a - b;
  }
  x[0] = first;
}
static inline void butterfly(Complex (&x)[3], const float* table) { odd_butterfly(x, table, 3); }
static inline void butterfly(Complex (&x)[5], const float* table) { odd_butterfly(x, table, 5); }
static inline void butterfly(Complex (&x)[7], const float* table) { odd_butterfly(x, table, 7); }

// ---- transforms
// ------------------------------------------------------------------------------------------------------

class Fft {
 public:
  static constexpr int kLargestRadix = 61;  // from here on a chirp is less work than the dense sum

  // Floats that `tables` must hold, and those that `scratch` must hold in `run`; aligned to a vector.
  static int64_t table_floats(int64_t n) {
    return smooth(n) ? pass_floats(n) : 2 * n + 2 * chirp_length(n) * Vec::kWidth + pass_floats(chirp_length(n));
  }
  static int64_t scratch_floats(int64_t n) { return (smooth(n) ? 4 * n : 6 * chirp_length(n)) * Vec::kWidth; }

  // `scratch` is needed during construction only for lengths with a large prime factor.
  Fft(int64_t n, float* tables, float* scratch) : n_(n) {
    const bool plain = smooth(n);
    length_ = plain ? n : chirp_length(n);
    float* free = tables;
    if (!plain) {
      response_ = {free, free + length_ * Vec::kWidth};
      free += 2 * length_ * Vec::kWidth;
      chirp_ = free;
      free += 2 * n;
    }
    make_passes(free);
    if (!plain) make_chirp(scratch);
  }

  // out may be in; scratch is neither.
  void run(Planes in, Planes out, float* scratch) const {
    if (chirp_) return convolve(in, out, scratch);
    transform(in, out, buffer(scratch, 0), buffer(scratch, 1));
  }

 private:
  static constexpr int kMostPasses = 32;
#if defined(__AVX512F__)
  static constexpr int kPower = 8;
#else
  static constexpr int kPower = 4;  // a radix-8 butterfly needs more than 16 registers
#endif
  struct Pass {
    int64_t radix, m, stride;
    const float *twiddles, *table;  // [j][k − 1] (cos, −sin); of the butterfly
  };

  int64_t n_, length_;
  int passes_ = 0;
  Pass pass_[kMostPasses];
  Planes response_{};             // transform of the chirp filter, scaled by 1/length_
  const float* chirp_ = nullptr;  // e^(−πi·k²/n)

  static int64_t largest_prime(int64_t n) {
    int64_t largest = 1;
    for (int64_t p = 2; p * p <= n; ++p) {
      for (; n % p == 0; n /= p) largest = p;
    }
    return n > largest ? n : largest;
  }
  static bool smooth(int64_t n) { return largest_prime(n) <= kLargestRadix; }
  static int64_t chirp_length(int64_t n) {  // the next length whose factors are 2, 3 and 5
    const int64_t factors[] = {2, 3, 5};
    for (int64_t length = 2 * n - 1;; ++length) {
      int64_t rest = length;
      for (int64_t p : factors) {
        while (rest % p == 0) rest /= p;
      }
      if (rest == 1) return length;
    }
  }

  Planes buffer(float* scratch, int which) const {
    float* at = scratch + which * 2 * length_ * Vec::kWidth;
    return {at, at + length_ * Vec::kWidth};
  }

  static double turn(int64_t numerator, int64_t denominator) {  // 2π·numerator/denominator
    return 6.283185307179586476925 * static_cast<double>(numerator % denominator) / static_cast<double>(denominator);
  }

  void make_passes(float* free) {
    int64_t rest = length_, stride = 1;
    while (rest > 1) {
      const int64_t radix = next_radix(rest), m = rest / radix;
      Pass& pass = pass_[passes_++];
      pass = {radix, m, stride, free, nullptr};
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t k = 1; k < radix; ++k, free += 2) {
          free[0] = static_cast<float>(std::cos(turn(j * k, rest)));
          free[1] = static_cast<float>(-std::sin(turn(j * k, rest)));
        }
      }
      if (radix % 2) pass.table = free;
      for (int64_t k = 1; radix % 2 && k <= radix / 2; ++k) {
        for (int64_t p = 1; p <= radix / 2; ++p, free += 2) {
          free[0] = static_cast<float>(std::cos(turn(k * p, radix)));
          free[1] = static_cast<float>(std::sin(turn(k * p, radix)));
        }
      }
      rest = m;
      stride *= radix;
    }
  }
  static int64_t pass_floats(int64_t n) {
    int64_t floats = 0;
    while (n > 1) {
      const int64_t radix = next_radix(n);
      n /= radix;
      floats += 2 * n * (radix - 1) + (radix % 2 ? 2 * (radix / 2) * (radix / 2) : 0);
    }
    return floats;
  }
  static int64_t next_radix(int64_t n) {
    for (int64_t radix = kPower; radix > 1; radix /= 2) {
      if (n % radix == 0) return radix;
    }
    int64_t radix = 3;
    while (n % radix) radix += 2;
    return radix;
  }

  void transform(Planes in, Planes out, Planes first, Planes second) const {
    if (!passes_) return out.put(0, in.get(0));
    for (int i = 0; i < passes_; ++i) {
      const Planes from = i == 0 ? in : i % 2 ? first : second, to = i + 1 == passes_ ? out : i % 2 ? second : first;
      switch (pass_[i].radix) {
        case 2: run_pass<2>(pass_[i], from, to); break;
        case 3: run_pass<3>(pass_[i], from, to); break;
        case 4: run_pass<4>(pass_[i], from, to); break;
        case 5: run_pass<5>(pass_[i], from, to); break;
        case 7: run_pass<7>(pass_[i], from, to); break;
        case 8: run_pass<8>(pass_[i], from, to); break;
        default: run_odd_pass(pass_[i], from, to); break;
      }
    }
  }

  static Complex twiddle(const float* w) { return {Vec(w[0]), Vec(w[1])}; }

  template <int kRadix>
  static void run_pass(const Pass& pass, Planes from, Planes to) {
    const int64_t step = pass.stride * pass.m;
    for (int64_t j = 0; j < pass.m; ++j) {
      const float* w = pass.twiddles + 2 * j * (kRadix - 1);
      for (int64_t q = 0; q < pass.stride; ++q) {
        Complex x[kRadix];
        const int64_t source = q + pass.stride * j, target = q + pass.stride * j * kRadix;
#pragma GCC unroll 8
        for (int p = 0; p < kRadix; ++p) x[p] = from.get(source + step * p);
        butterfly(x, pass.table);
        to.put(target, x[0]);
        if (j == 0) {
#pragma GCC unroll 8
          for (int k = 1; k < kRadix; ++k) to.put(target + pass.stride * k, x[k]);
        } else {
#pragma GCC unroll 8
          for (int k = 1; k < kRadix; ++k) to.put(target + pass.stride * k, x[k] * twiddle(w + 2 * (k - 1)));
        }
      }
    }
  }

  static void run_odd_pass(const Pass& pass, Planes from, Planes to) {
    const int64_t radix = pass.radix, step = pass.stride * pass.m;
    for (int64_t j = 0; j < pass.m; ++j) {
      const float* w = pass.twiddles + 2 * j * (radix - 1);
      for (int64_t q = 0; q < pass.stride; ++q) {
        Complex x[kLargestRadix];
        const int64_t source = q + pass.stride * j, target = q + pass.stride * j * radix;
        for (int64_t p = 0; p < radix; ++p) x[p] = from.get(source + step * p);
        odd_butterfly(x, pass.table, static_cast<int>(radix));
        to.put(target, x[0]);
        for (int64_t k = 1; k < radix; ++k) to.put(target + pass.stride * k, x[k] * twiddle(w + 2 * (k - 1)));
      }
    }
  }

  // X[k] = c[k] · Σ_j (x[j]·c[j]) · conj(c[k − j]) with c[k] = e^(−πi·k²/n), since jk = (j² + k² − (k − j)²)/2.
  void convolve(Planes in, Planes out, float* scratch) const {
    const Planes a = buffer(scratch, 0), b = buffer(scratch, 1), c = buffer(scratch, 2);
    for (int64_t i = 0; i < n_; ++i) a.put(i, in.get(i) * twiddle(chirp_ + 2 * i));
    for (int64_t i = n_; i < length_; ++i) a.put(i, {});
    transform(a, a, b, c);
    for (int64_t i = 0; i < length_; ++i) a.put(i, a.get(i) * response_.get(i));
    transform(a.exchanged(), a.exchanged(), b, c);
    for (int64_t i = 0; i < n_; ++i) out.put(i, a.get(i) * twiddle(chirp_ + 2 * i));
  }

  void make_chirp(float* scratch) {
    float* chirp = const_cast<float*>(chirp_);
    for (int64_t k = 0; k < n_; ++k) {  // k² mod 2n keeps the angle exact
      chirp[2 * k] = static_cast<float>(std::cos(turn(k * k % (2 * n_), 2 * n_)));
      chirp[2 * k + 1] = static_cast<float>(-std::sin(turn(k * k % (2 * n_), 2 * n_)));
    }
    const Vec scale(1.0f / static_cast<float>(length_));
    for (int64_t i = 0; i < length_; ++i) response_.put(i, {});
    for (int64_t k = 0; k < n_; ++k) {
      const Complex value = {Vec(chirp[2 * k]) * scale, Vec(-chirp[2 * k + 1]) * scale};
      response_.put(k, value);
      if (k) response_.put(length_ - k, value);
    }
    transform(response_, response_, buffer(scratch, 0), buffer(scratch, 1));
  }
};

}  // namespace irt::INPAINTRT_ISA
