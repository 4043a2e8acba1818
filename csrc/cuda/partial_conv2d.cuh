// partial_conv2d on the GPU: u · (window / (s + eps) · u · sum + bias) on the shared implicit GEMM (conv2d.cuh) of
// x · mask, and u = s within [0, 1].
//
// s, the sum of the mask over a window, is one plane for all outputs. A small kernel makes it, after another one has
// summed the channels of a mask that has several.
#pragma once

#include "conv2d.cuh"
#include "plan/partial_conv2d.h"

namespace irt {

__device__ __forceinline__ float partial_clamp(float s) { return s < 0.0f ? 0.0f : s > 1.0f ? 1.0f : s; }

// The sum over channels, a pixel a thread.
template <class T>
__global__ void __launch_bounds__(PartialSums::kThreads)
    partial_conv2d_plane(const __grid_constant__ PartialSums p, void* workspace) {
  const int index = static_cast<int>(blockIdx.x * PartialSums::kThreads + threadIdx.x);
  const int row = index / p.size[1], sample = row / p.size[0];
  if (sample >= p.samples) return;
  const T* at = static_cast<const T*>(p.mask.data) + sample * p.mask.strides[0] +
                (row - sample * p.size[0]) * p.mask.strides[2] + (index - row * p.size[1]) * p.mask.strides[3];
  float sums[4] = {};
  int c = 0;
  for (; c + 4 <= p.channels; c += 4) {
    IRT_UNROLL
    for (int i = 0; i < 4; ++i, at += p.mask.strides[1]) sums[i] += to_float(*at);
  }
  for (; c < p.channels; ++c, at += p.mask.strides[1]) sums[0] += to_float(*at);
  float* const plane = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + p.plane_at);
  plane[index] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The sum over a window, an output pixel a thread, of the plane or of a mask that is one.
template <class T>
__global__ void __launch_bounds__(PartialSums::kThreads)
    partial_conv2d_sums(const __grid_constant__ PartialSums p, void* workspace) {
  const int index = static_cast<int>(blockIdx.x * PartialSums::kThreads + threadIdx.x);
  const int row = index / p.out_size[1], sample = row / p.out_size[0];
  if (sample >= p.samples) return;
  const int top = (row - sample * p.out_size[0]) * p.stride - p.before[0];
  const int left = (index - row * p.out_size[1]) * p.stride - p.before[1];
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  const float* const plane = p.plane_at < 0 ? nullptr
                                            : reinterpret_cast<const float*>(memory + p.plane_at) +
                                                  static_cast<long long>(sample) * p.size[0] * p.size[1];
  const T* const mask = static_cast<const T*>(p.mask.data) + sample * p.mask.strides[0];
  float sum = 0.0f;
  for (int i = 0; i < p.kernel[0]; ++i) {
    const int y = top + i * p.dilation;
    if (y < 0 || y >= p.size[0]) continue;
    for (int j = 0; j < p.kernel[1]; ++j) {
      const int x = left + j * p.dilation;
      if (x < 0 || x >= p.size[1]) continue;
      sum += plane ? plane[static_cast<long long>(y) * p.size[1] + x]
                   : to_float(mask[y * p.mask.strides[2] + x * p.mask.strides[3]]);
    }
  }
  reinterpret_cast<float*>(memory + p.sums_at)[index] = sum;
  T updated;
  from_float(partial_clamp(sum), updated);
  const long long samples = static_cast<long long>(p.samples) * p.out_size[0] * p.out_size[1];
  for (int copy = 0; copy < p.copies; ++copy) static_cast<T*>(p.updated)[copy * samples + index] = updated;
}

template <class T, Products kProducts, int kOutputs>
__global__ void __launch_bounds__(Conv2d::threads(kOutputs), Conv2d::kResident / Conv2d::threads(kOutputs))
    partial_conv2d(const __grid_constant__ PartialConv2d p, void* workspace) {
  const float* const sums_of_mask =
      reinterpret_cast<const float*>(static_cast<const unsigned char*>(workspace) + p.sums_at);
  conv2d::run<T, kProducts, kOutputs>(
      p.conv, workspace, [&p, sums_of_mask](const float* sums, const Conv2d::Pixel& at, int output) {
        const float s = sums_of_mask[at.sample * p.sums_of_sample +
                                     static_cast<long long>(at.row) * p.conv.out_size[1] + at.column];
        const float u = partial_clamp(s);
        if (u == 0.0f) return 0.0f;  // whatever lies under the hole
        float value = sums[0] * (p.window / (s + p.eps) * u);
        if (p.bias.data) value = (value + conv2d::element<T>(p.bias, output)) * u;
        return value;
      });
}

}  // namespace irt
