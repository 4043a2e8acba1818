// What the kernels of fourier_unit are given: one struct for all launches of a call. Read by the planner (host C++) and
// the kernels (nvcc and NVRTC).
#pragma once

#include "fft.h"

namespace irt {

// The workspace, in floats: packed weights, packed bias, spectra of x, spectra of the output. Spectra are complex
// numbers by (batch, kx), then by channel and y; `channels_inner` says which of these two is contiguous, as in x.
struct FourierUnit {
  static constexpr int kThreads = Fft::kThreads, kWarps = kThreads / 32;
  static constexpr int kWarpChannels = 4;  // of the output, that a warp of the mix forms, at 32 · kPerLane places
  static constexpr int kMixChannels = 32;  // of the input, that an unfused mix holds in shared memory at a time

  struct Tensor {
    void* data;            // null where it is absent
    long long strides[4];  // of b, channel, y, x in elements
  };
  Tensor x, residual, out;
  const void* weight;
  const void* bias;  // or null
  long long weight_strides[2], bias_stride;

  int inputs, outputs;      // channels, C and Co
  int height, width, half;  // half = width / 2 + 1, the number of kx
  bool channels_inner;
  float scale;  // of either transform: 1 / sqrt(height · width)

  int weight_rows, weight_pitch;             // 2·Co to whole slices, 2·C to a multiple of 4, filled up with 0
  long long bias_at, inputs_at, outputs_at;  // in the workspace
  IRT_BOTH int channel_pairs() const { return weight_pitch / 4; }

  // Row kernels. A block has `pairs` pairs of neighbouring rows, each pair one complex transform.
  Fft row;
  Divisor<int> pairs, wide;  // wide = width
  int row_blocks;            // of the forward kernel; blocks beyond pack the weights

  // Column kernels. A block has `lines` channels of one kx; fused, these are all, and a slice of the output's.
  Fft column;
  Divisor<int> tall, lines, slice;  // tall = height; slice: output channels
  int slices;                       // of the output's channels
  int rows_tiles, lanes_tiles;      // fused: how the warps share W · z; the product is at most kWarps
};

}  // namespace irt
