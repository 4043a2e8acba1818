// Resampling by a FIR filter, and what may follow it in a modulated convolution. Bound by memory where the filter has
// 4 × 4 taps: the reads of neighbouring outputs overlap, and come from the first cache but once.
//
// Taps that would meet the zeros between the samples are left out: every up-th counts, from one on that depends on the
// output's place. Threads are counted in the order in which the output lies.
//
// Considered:
// - Rows and columns in turn, for filters that are outer products, as the CPU kernel does: 8 products for 16, but the
//   halves meet in shared memory, and products are not what bounds it.
#pragma once

#include "conv2d.cuh"
#include "plan/resample.h"

namespace irt {

template <class T, int kPack>
__device__ __forceinline__ void resample(const Resample& p, const void* image, void* out) {
  const int index = static_cast<int>(blockIdx.x * Resample::kThreads + threadIdx.x);
  if (index >= p.count) return;
  const int second_on = p.sizes[0].quotient(index), third_on = p.sizes[1].quotient(second_on);
  const int sample = p.sizes[2].quotient(third_on);
  const int first = index - second_on * p.sizes[0].value, second = second_on - third_on * p.sizes[1].value;
  const int third = third_on - sample * p.sizes[2].value;
  const int channel = p.inner ? first * kPack : third, column = p.inner ? second : first;
  const int row = p.inner ? third : second;

  const T* const from = static_cast<const T*>(image) + sample * p.image.strides[0] + channel * p.image.strides[1];
  const Resample::Axis::Reach y = p.rows.reach(row), x = p.columns.reach(column);
  float sums[kPack] = {};
  IRT_ROLL
  for (int i = y.tap, at_y = y.sample; i < p.rows.taps; i += p.rows.up.value, ++at_y) {
    if (at_y < 0 || at_y >= p.rows.size) continue;
    for (int j = x.tap, at_x = x.sample; j < p.columns.taps; j += p.columns.up.value, ++at_x) {
      if (at_x < 0 || at_x >= p.columns.size) continue;
      const float tap = p.filter ? p.filter[i * p.filter_strides[0] + j * p.filter_strides[1]] : 1.0f;
      const Pack<T, kPack> values = load_pack<kPack>(from + at_y * p.image.strides[2] + at_x * p.image.strides[3]);
      IRT_UNROLL
      for (int v = 0; v < kPack; ++v) sums[v] += tap * to_float(values.values[v]);
    }
  }

  float noise = 0.0f;
  if (p.noise.data) {
    noise = to_float(static_cast<const T*>(
        p.noise.data)[sample * p.noise.strides[0] + row * p.noise.strides[2] + column * p.noise.strides[3]]);
    if (p.strength) noise *= to_float(*static_cast<const T*>(p.strength));
  }
  Pack<T, kPack> result;
  IRT_UNROLL
  for (int v = 0; v < kPack; ++v) {
    float value = sums[v] * p.factor + noise;
    if (p.bias.data) value += conv2d::element<T>(p.bias, channel + v);
    from_float(conv2d::styled<T>(p.act, value, p.alpha, p.gain, p.bound), result.values[v]);
  }
  store_pack(static_cast<T*>(out) + sample * p.out_strides[0] + channel * p.out_strides[1] + row * p.out_strides[2] +
                 column * p.out_strides[3],
             result);
}

}  // namespace irt
