// Complex Fourier transforms of many lines at once, in place in shared memory, of any length.
//
// Forward is decimation in frequency: each stage is butterflies, then twiddle factors, and frequency k ends up at
// `place(fft, k)`, its digits reversed. Inverse is the exact mirror: decimation in time, from those places to natural
// order. So what treats all frequencies alike between the two, such as the product of a Fourier unit, needs no
// reordering. Both are unscaled. Neighbouring threads work on neighbouring lines: no bank conflicts (the pitch is odd),
// and a twiddle factor is one value for a whole warp.
#pragma once

#include "common.cuh"
#include "plan/fft.h"

namespace irt {

// Calls f(i, j) once for all i < ni and j < nj, spread over the block's threads; neighbours have neighbouring i.
template <class F>
__device__ __forceinline__ void for_each(const Divisor<int>& ni, int nj, const F& f) {
  for (int at = threadIdx.x; at < ni.value * nj; at += Fft::kThreads) {
    const int j = ni.quotient(at);
    f(at - j * ni.value, j);
  }
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }

// a · root, or a · conj(root) for the inverse.
template <bool kInverse>
__device__ __forceinline__ float2 turned(float2 a, float2 root) {
  const float sine = kInverse ? -root.y : root.y;
  return make_float2(a.x * root.x - a.y * sine, a.x * sine + a.y * root.x);
}

// e^(-2πi k/n), 0 <= k < n, to the last bit but one: the angle is reduced to an eighth of a turn in integers.
__device__ __forceinline__ float2 root_of_unity(int k, int n) {
  const int eighth = 8 * k / n, rest = 8 * k - eighth * n;
  const bool odd = eighth & 1;  // measured back from the next quarter of a turn
  float sine, cosine;
  sincospif(static_cast<float>(odd ? rest - n : rest) / static_cast<float>(4 * n), &sine, &cosine);
  switch ((eighth + 1) / 2 & 3) {
    case 0: return make_float2(cosine, -sine);
    case 1: return make_float2(-sine, -cosine);
    case 2: return make_float2(-cosine, sine);
    default: return make_float2(sine, cosine);
  }
}

// The twiddle factors of length n. The caller synchronises, here as everywhere below: before the next use.
__device__ __forceinline__ void fill_roots(float2* roots, int n) {
  for (int k = threadIdx.x; k < n; k += Fft::kThreads) roots[k] = root_of_unity(k, n);
}

// Where the forward transform leaves frequency k.
__device__ __forceinline__ int place(const Fft& fft, int k) {
  int at = 0;
  for (int s = 0; s < fft.stages; ++s) {
    const int rest = k / fft.stage[s].radix;
    at += (k - rest * fft.stage[s].radix) * fft.stage[s].span.value;
    k = rest;
  }
  return at;
}

// v becomes its transform of R points; `step` = n / R is the distance of R-th roots of unity in `roots`.
template <int R, bool kInverse>
__device__ __forceinline__ void butterfly(float2 (&v)[R], const float2* roots, int step) {
  if constexpr (R == 2) {
    const float2 a = v[0];
    v[0] = a + v[1];
    v[1] = a - v[1];
  } else if constexpr (R == 4) {
    const float2 a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = v[1] - v[3];
    const float2 turn = kInverse ? make_float2(-d.y, d.x) : make_float2(d.y, -d.x);  // ±i · d
    v[0] = a + c;
    v[1] = b + turn;
    v[2] = a - c;
    v[3] = b - turn;
  } else {  // odd: inputs q and R - q share the cosines of their factors, and differ in the sign of the sines
    constexpr int kHalf = R / 2;
    float2 sum[kHalf + 1], difference[kHalf + 1], root[kHalf + 1];
    IRT_UNROLL
    for (int q = 1; q <= kHalf; ++q) {
      sum[q] = v[q] + v[R - q];
      difference[q] = v[q] - v[R - q];
      root[q] = roots[q * step];
    }
    const float2 first = v[0];
    IRT_UNROLL
    for (int q = 1; q <= kHalf; ++q) v[0] = v[0] + sum[q];
    IRT_UNROLL
    for (int k = 1; k <= kHalf; ++k) {
      float2 even = first, odd = make_float2(0.0f, 0.0f);
      IRT_UNROLL
      for (int q = 1; q <= kHalf; ++q) {
        const int turns = k * q % R, at = turns <= kHalf ? turns : R - turns;
        const float cosine = root[at].x, sine = (turns <= kHalf) != kInverse ? root[at].y : -root[at].y;
        even = make_float2(even.x + cosine * sum[q].x, even.y + cosine * sum[q].y);
        odd = make_float2(odd.x - sine * difference[q].y, odd.y + sine * difference[q].x);
      }
      v[k] = even + odd;
      v[R - k] = even - odd;
    }
  }
}

template <int R, bool kInverse>
__device__ __forceinline__ void stage_of(const Fft& fft, const Fft::Stage& stage, float2* z, const Divisor<int>& lines,
                                         const float2* roots) {
  const int span = stage.span.value;
  for_each(lines, fft.n / R, [&](int line, int index) {
    const int block = stage.span.quotient(index), j = index - block * span, turn = j * stage.step;
    float2* const at = z + line * fft.pitch() + block * R * span + j;
    float2 v[R];
    IRT_UNROLL
    for (int q = 0; q < R; ++q) v[q] = kInverse && q ? turned<true>(at[q * span], roots[q * turn]) : at[q * span];
    butterfly<R, kInverse>(v, roots, fft.n / R);
    IRT_UNROLL
    for (int q = 0; q < R; ++q) at[q * span] = kInverse || !q ? v[q] : turned<false>(v[q], roots[q * turn]);
  });
  __syncthreads();
}

// A stage of any radix: each thread forms one output at a time as a sum over the radix, O(radix²) in all. Outputs of a
// round go to `scratch` until all of its inputs have been read.
template <bool kInverse>
__device__ __forceinline__ void dense_stage(const Fft& fft, const Fft::Stage& stage, float2* z,
                                            const Divisor<int>& lines, const float2* roots, float2* scratch) {
  struct Output {
    float2* first;  // point of its block
    int k, j;       // the output is point k · span; j is the offset within span
  };
  const int radix = stage.radix, span = stage.span.value, step = fft.n / radix;
  const int total = lines.value * step, round = fft.scratch / radix;
  for (int begin = 0; begin < total; begin += round) {
    const int count = (total - begin < round ? total - begin : round) * radix;
    const auto output = [&](int i) -> Output {
      const int unit = begin + i / radix, index = lines.quotient(unit), block = stage.span.quotient(index);
      const int line = unit - index * lines.value, j = index - block * span;
      return {z + line * fft.pitch() + block * radix * span + j, i % radix, j};
    };
    for (int i = threadIdx.x; i < count; i += Fft::kThreads) {
      const Output out = output(i);
      const int turn = out.k * step + (kInverse ? out.j * stage.step : 0);  // below n
      float2 sum = make_float2(0.0f, 0.0f);
      for (int q = 0, angle = 0; q < radix;) {  // in parts of 32, since rounding errors grow with a sum's length
        float2 part = make_float2(0.0f, 0.0f);
        for (const int end = radix - q < 32 ? radix : q + 32; q < end; ++q) {
          part = part + turned<kInverse>(out.first[q * span], roots[angle]);
          angle += angle + turn < fft.n ? turn : turn - fft.n;
        }
        sum = sum + part;
      }
      scratch[i] = kInverse ? sum : turned<false>(sum, roots[out.k * out.j * stage.step]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += Fft::kThreads) {
      const Output out = output(i);
      out.first[out.k * span] = scratch[i];
    }
    __syncthreads();
  }
}

// All stages over `lines` lines; synchronised at its end. (The beginning is the caller's.)
template <bool kInverse>
__device__ __forceinline__ void transform(const Fft& fft, float2* z, const Divisor<int>& lines, const float2* roots,
                                          float2* scratch) {
  for (int s = 0; s < fft.stages; ++s) {
    const Fft::Stage& stage = fft.stage[kInverse ? fft.stages - 1 - s : s];
    switch (stage.radix) {
      case 2: stage_of<2, kInverse>(fft, stage, z, lines, roots); break;
      case 3: stage_of<3, kInverse>(fft, stage, z, lines, roots); break;
      case 4: stage_of<4, kInverse>(fft, stage, z, lines, roots); break;
      case 5: stage_of<5, kInverse>(fft, stage, z, lines, roots); break;
      case 7: stage_of<7, kInverse>(fft, stage, z, lines, roots); break;
      default: dense_stage<kInverse>(fft, stage, z, lines, roots, scratch);
    }
  }
}

}  // namespace irt
