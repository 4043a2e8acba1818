// What the kernels of modulated_conv2d are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "resample.h"

namespace irt {

// Of each image's style a factor for each channel of the input, s/u, and one for each sum, (Σ (s/u · W)² +
// eps/(γ·u)²)^−½, u being the power of two above the largest |s|: products of 16 bits stay in range, whatever the style
// is. A warp makes one output's.
struct Modulation {
  static constexpr int kThreads = 256, kOutputs = kThreads / 32;

  Conv2d::Tensor weight;  // (outputs, channels, rows, columns)
  const void* style;      // (B, channels)
  long long style_strides[2];
  long long inputs_at, sums_at;   // in the workspace, in bytes: (B, channels) and (B, outputs) float
  Divisor<int> taps, columns;     // of a channel, of a row
  int channels, outputs, blocks;  // of an image
  float gain, eps;
  bool demodulate;
};

// The convolution with the shared weight, between these factors, and what follows where no filter does.
struct ModulatedConv2d {
  Conv2d conv;
  long long inputs_at, sums_at, image_at, out_at;  // in the workspace; of the last two, where there is no pointer
  Conv2d::Tensor noise;                            // of one channel; may be absent, as the next two
  const void* strength;
  Conv2d::Vector bias;
  float alpha, gain, bound;  // no bound: infinity
  int act;
};

}  // namespace irt
