// What the kernels of sampler_step and linear_step share: where a thread's four elements lie, and their noise.
#pragma once

#include "philox.cuh"
#include "plan/step.h"

namespace irt {

constexpr unsigned kStepStream = 1, kKnownStream = 2;

// The four elements of a thread. They may lie in two channels, and the last ones may not exist.
template <class Offset>
struct StepElements {
  Offset sample, block;
  int count;  // of elements that exist
  Offset channel[4], inside[4], row[4], column[4];

  __device__ __forceinline__ StepElements(const StepShape<Offset>& shape, Offset index) {
    sample = shape.blocks.quotient(index);
    block = index - sample * shape.blocks.value;
    const Offset first = 4 * block, left = shape.elements - first;
    count = left < 4 ? static_cast<int>(left) : 4;
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Offset element = first + i;
      channel[i] = shape.plane.quotient(element);
      inside[i] = element - channel[i] * shape.plane.value;
      row[i] = shape.width.quotient(inside[i]);
      column[i] = inside[i] - row[i] * shape.width.value;
    }
  }

  __device__ __forceinline__ Offset at(const StepImage<Offset>& image, int i) const {
    const Offset plane = sample * image.strides[0] + channel[i] * image.strides[1];
    return plane + (image.dense ? inside[i] : row[i] * image.strides[2] + column[i] * image.strides[3]);
  }

  // The elements of an image, `further` elements on from where it begins; 0 where there are none.
  template <class T>
  __device__ __forceinline__ void read(const StepImage<Offset>& image, Offset further, float (&values)[4]) const {
    const T* const data = static_cast<const T*>(image.data) + further;
    if (image.packed) {
      const Pack<T, 4> pack = load_pack<4>(data + at(image, 0));
      IRT_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = to_float(pack.values[i]);
      return;
    }
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = i < count ? to_float(data[at(image, i)]) : 0.0f;
  }

  template <class T>
  __device__ __forceinline__ void write(const StepImage<Offset>& image, const float (&values)[4]) const {
    T* const data = static_cast<T*>(const_cast<void*>(image.data));
    Pack<T, 4> pack;
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) from_float(values[i], pack.values[i]);
    if (image.packed) return store_pack(data + at(image, 0), pack);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < count) data[at(image, i)] = pack.values[i];
    }
  }
};

template <class Offset>
__device__ __forceinline__ unsigned step_number(const StepNoise<Offset>& noise) {
  if (!noise.counter) return noise.call;
  return noise.wide_counter ? static_cast<unsigned>(*static_cast<const long long*>(noise.counter))
                            : static_cast<unsigned>(*static_cast<const int*>(noise.counter));
}

// A step's noise where an element is unknown, the known region's where it is known: each is drawn only by threads that
// have such an element. What is not needed is left as it was.
template <class Offset>
__device__ __forceinline__ void step_draw(const StepNoise<Offset>& noise, const StepElements<Offset>& e,
                                          const float (&mask)[4], float (&z)[4], float (&k)[4]) {
  bool known = false, unknown = false;
  IRT_UNROLL
  for (int i = 0; i < 4; ++i) {
    known = known || !(mask[i] == 0.0f);  // NaN is both
    unknown = unknown || !(mask[i] == 1.0f);
  }
  const long long seed = noise.seeds[e.sample * noise.seed];
  const unsigned call = step_number(noise);
  if (unknown) philox_normals(seed, kStepStream, call, e.block, z);
  if (known) philox_normals(seed, kKnownStream, call, e.block, k);
}

// NaN passes.
__device__ __forceinline__ float within(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }

}  // namespace irt
