// Counter-based normal noise on the device (inpaintrt/ops/_philox.py defines it), with the polynomials of
// csrc/cpu/philox.h: the same numbers on every backend, to the last bits of a float.
#pragma once

#include "common.cuh"

namespace irt {

struct PhiloxWords {
  unsigned words[4];
};

// Philox4x32-10.
__device__ __forceinline__ PhiloxWords philox(PhiloxWords c, unsigned key0, unsigned key1) {
  IRT_UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product0 = 0xd2511f53ull * c.words[0], product1 = 0xcd9e8d57ull * c.words[2];
    c = {{static_cast<unsigned>(product1 >> 32) ^ c.words[1] ^ key0, static_cast<unsigned>(product1),
          static_cast<unsigned>(product0 >> 32) ^ c.words[3] ^ key1, static_cast<unsigned>(product0)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

__device__ __forceinline__ float philox_uniform(unsigned word) {  // in [2^-33, 1]
  return fmaf(static_cast<float>(word), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

__device__ __forceinline__ float minus_two_log(float u) {  // of [2^-33, 1]; exactly 0 for 1
  const int root_half = 0x3f3504f3, bits = __float_as_int(u) - root_half;
  const float n = static_cast<float>(bits >> 23);
  const float f = __int_as_float((bits & 0x7fffff) + root_half) - 1.0f, t = f * f;
  float p = fmaf(f, -7.634496689e-2f, 1.276157647e-1f);
  p = fmaf(p, f, -1.316018254e-1f);
  p = fmaf(p, f, 1.420175731e-1f);
  p = fmaf(p, f, -1.662335694e-1f);
  p = fmaf(p, f, 2.000122666e-1f);
  p = fmaf(p, f, -2.500081956e-1f);
  p = fmaf(p, f, 3.333333135e-1f);
  p = fmaf(n, -2.12194440e-4f, p * f * t);
  p = f + fmaf(t, -0.5f, p);
  return -2.0f * fmaf(n, 0.693359375f, p);
}

// cos 2πu and sin 2πu of [0, 1]: right angles apart, exactly, then within an eighth of a turn.
__device__ __forceinline__ void circle(float u, float& cosine, float& sine) {
  const int q = static_cast<int>(4.0f * u + 0.5f);
  const float f = fmaf(static_cast<float>(q), -0.25f, u), t = f * f;
  float c = fmaf(t, 5.922924423e1f, -8.544324493e1f);
  c = fmaf(c, t, 6.493932343e1f);
  c = fmaf(c, t, -1.973920822e1f);
  c = fmaf(c, t, 1.0f);
  float s = fmaf(t, -7.545339966e1f, 8.159394073e1f);
  s = fmaf(s, t, -4.134167480e1f);
  s = fmaf(s, t, -1.748455603e-7f);  // what float32 leaves of 2π
  s = fmaf(f, 6.283185482f, f * s);
  const float x = q & 1 ? s : c, y = q & 1 ? c : s;
  cosine = (q + 1) & 2 ? -x : x;
  sine = q & 2 ? -y : y;
}

// The normals of elements 4·block to 4·block + 3 of a sample.
__device__ __forceinline__ void philox_normals(long long seed, unsigned stream, unsigned call, long long block,
                                               float (&z)[4]) {
  const unsigned long long key = static_cast<unsigned long long>(seed), at = static_cast<unsigned long long>(block);
  const PhiloxWords w = philox({{static_cast<unsigned>(at), static_cast<unsigned>(at >> 32), stream, call}},
                               static_cast<unsigned>(key), static_cast<unsigned>(key >> 32));
  IRT_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const float radius = sqrtf(minus_two_log(philox_uniform(w.words[2 * pair])));
    float cosine, sine;
    circle(philox_uniform(w.words[2 * pair + 1]), cosine, sine);
    z[2 * pair] = radius * cosine;
    z[2 * pair + 1] = radius * sine;
  }
}

}  // namespace irt
