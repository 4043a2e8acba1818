// The activations that every fused op offers, on the device. Names are the Python API's.
#pragma once

#include "common.cuh"

namespace irt {

enum class Act { none, relu, leaky_relu, elu, silu, sigmoid, tanh };

// Elementary functions in float, as exact as the storage type T can show. For float: CUDA's own, about 2 ulp. For the
// half types, whose rounding is 2^-9 and 2^-12, the hardware's exponential: these kernels are bound by memory only
// while an element costs less than some 35 instructions.
template <class T>
struct Math {
  static __device__ __forceinline__ float exp(float x) { return __expf(x); }
  static __device__ __forceinline__ float expm1(float x) {
    // Near 0, e^x - 1 loses what __expf rounds away; the quartic's relative error is below 2^-22 there.
    const float near = x * (1.0f + x * (0.5f + x * (0.16666667f + x * 0.041666668f)));
    return fabsf(x) < 0.0625f ? near : __expf(x) - 1.0f;
  }
  static __device__ __forceinline__ float tanh(float x) {
    x = x > 10.0f ? 10.0f : x < -10.0f ? -10.0f : x;  // float's tanh is 1 there; NaN passes
    const float e = expm1(2.0f * x);
    return __fdividef(e, e + 2.0f);
  }
};
template <>
struct Math<float> {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float expm1(float x) { return expm1f(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
};

// 0 at -inf, 1 at +inf, NaN kept. The quick division is exact to 2 ulp below 2^126 and gives 0 above, as e^-x is there.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + Math<T>::exp(-x));
}

template <class T, Act act>
__device__ __forceinline__ float activate(float x, float alpha) {
  if constexpr (act == Act::relu) return x < 0.0f ? 0.0f : x;
  if constexpr (act == Act::leaky_relu) return x > 0.0f ? x : x * alpha;
  if constexpr (act == Act::elu) return x > 0.0f ? x : alpha * Math<T>::expm1(x);
  if constexpr (act == Act::silu) return x * sigmoid<T>(x);
  if constexpr (act == Act::sigmoid) return sigmoid<T>(x);
  if constexpr (act == Act::tanh) return Math<T>::tanh(x);
  return x;
}

}  // namespace irt
