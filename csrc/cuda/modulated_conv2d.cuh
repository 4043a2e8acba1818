// modulated_conv2d on the GPU: the shared weight's convolution (conv2d.cuh), with the style on its input and the
// demodulation on its sums. No filters per image.
//
// Doubling is a transposed convolution by phases, into the workspace, and the filter over its result, with noise, bias,
// activation, gain and bound behind it; halving filters first. Why so, and what it costs: kernels/modulated_conv2d.py.
#pragma once

#include "conv2d.cuh"
#include "plan/modulated_conv2d.h"
#include "resample.cuh"

namespace irt {

namespace modulated {

template <class T>
__device__ __forceinline__ T* in_workspace(void* workspace, long long at) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + at);
}

// What the convolution reads and writes, which may lie in the workspace; channels are scaled as they are read.
template <class T>
struct Styled {
  const ModulatedConv2d& p;
  void* workspace;

  __device__ __forceinline__ const void* part(int) const {
    return p.conv.parts[0].data ? p.conv.parts[0].data : in_workspace<T>(workspace, p.image_at);
  }
  __device__ __forceinline__ void* out() const {
    return p.conv.out ? p.conv.out : in_workspace<T>(workspace, p.out_at);
  }
  template <int kPerPack>
  __device__ __forceinline__ void adjust(Pack<T, kPerPack>& held, int sample, int channel, int count) const {
    const float* const factors =
        in_workspace<float>(workspace, p.inputs_at) + static_cast<long long>(sample) * p.conv.channels + channel;
    IRT_UNROLL
    for (int v = 0; v < kPerPack; ++v) {
      if (v < count) from_float(to_float(held.values[v]) * factors[v], held.values[v]);
    }
  }
};

}  // namespace modulated

template <class T>
__global__ void __launch_bounds__(Modulation::kThreads)
    modulated_conv2d_style(const __grid_constant__ Modulation p, void* workspace) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int image = static_cast<int>(blockIdx.x) / p.blocks, block = static_cast<int>(blockIdx.x) % p.blocks;
  const int output = block * Modulation::kOutputs + thread / 32;
  if (output >= p.outputs) return;  // a whole warp
  const T* const style = static_cast<const T*>(p.style) + image * p.style_strides[0];

  float largest = 0.0f;
  for (int c = lane; c < p.channels; c += 32) {
    largest = fmaxf(largest, fabsf(to_float(style[c * p.style_strides[1]])));
  }
  IRT_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  // The power of two above the largest, between 2⁻⁵⁹ and 2⁶¹.
  largest = fminf(fmaxf(largest, 8.7e-19f), 1.2e18f);
  const float unit = __int_as_float((__float_as_int(largest) & 0x7f800000) + 0x00800000);

  if (output == 0) {
    float* const inputs =
        modulated::in_workspace<float>(workspace, p.inputs_at) + static_cast<long long>(image) * p.channels;
    for (int c = lane; c < p.channels; c += 32) inputs[c] = to_float(style[c * p.style_strides[1]]) / unit;
  }
  float scale = p.gain * unit;
  if (p.demodulate) {
    const T* const filter = static_cast<const T*>(p.weight.data) + output * p.weight.strides[0];
    float total = 0.0f;
    for (int i = lane; i < p.channels * p.taps.value; i += 32) {
      const int c = p.taps.quotient(i), tap = i - c * p.taps.value, row = p.columns.quotient(tap);
      const float value = to_float(filter[c * p.weight.strides[1] + row * p.weight.strides[2] +
                                          (tap - row * p.columns.value) * p.weight.strides[3]]) *
                          (to_float(style[c * p.style_strides[1]]) / unit);
      total += value * value;
    }
    IRT_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    scale = (scale < 0.0f ? -1.0f : 1.0f) / sqrtf(total + p.eps / (scale * scale));
  }
  if (lane == 0) {
    modulated::in_workspace<float>(workspace, p.sums_at)[static_cast<long long>(image) * p.outputs + output] = scale;
  }
}

template <class T, Products kProducts, int kOutputs>
__global__ void __launch_bounds__(Conv2d::threads(kOutputs), Conv2d::kResident / Conv2d::threads(kOutputs))
    modulated_conv2d(const __grid_constant__ ModulatedConv2d p, void* workspace) {
  const float* const scales = modulated::in_workspace<float>(workspace, p.sums_at);
  const modulated::Styled<T> operands{p, workspace};
  const auto finish = [&p, scales](const float* sums, const Conv2d::Pixel& at, int output) {
    float value = sums[0] * scales[static_cast<long long>(at.sample) * p.conv.outputs + output];
    if (p.noise.data) {
      const float noise = to_float(static_cast<const T*>(
          p.noise.data)[at.sample * p.noise.strides[0] + at.row * p.noise.strides[2] + at.column * p.noise.strides[3]]);
      value += p.strength ? noise * to_float(*static_cast<const T*>(p.strength)) : noise;
    }
    if (p.bias.data) value += conv2d::element<T>(p.bias, output);
    return conv2d::styled<T>(p.act, value, p.alpha, p.gain, p.bound);
  };
  conv2d::run<T, kProducts, kOutputs>(p.conv, workspace, finish, operands);
}

template <class T, int kPack>
__global__ void __launch_bounds__(Resample::kThreads)
    modulated_conv2d_filter(const __grid_constant__ Resample p, void* workspace) {
  resample<T, kPack>(p, p.image.data ? p.image.data : modulated::in_workspace<T>(workspace, p.image_at),
                     p.out ? p.out : modulated::in_workspace<T>(workspace, p.out_at));
}

}  // namespace irt
