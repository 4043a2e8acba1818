// What the kernels of partial_conv2d are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "conv2d.h"

namespace irt {

// u · (window / (s + eps) · u · sum + bias), s being the sum of the mask over a window and u that within [0, 1].
struct PartialConv2d {
  Conv2d conv;
  Conv2d::Vector bias;
  long long sums_at;         // in the workspace, in bytes: (1|B, H', W') float
  long long sums_of_sample;  // elements to the next sample's; 0 where one mask serves all
  float window, eps;
};

// s and u from the mask; where it has several channels, through a plane of their sums.
struct PartialSums {
  static constexpr int kThreads = 256;

  Conv2d::Tensor mask;
  int channels;
  long long plane_at, sums_at;  // in the workspace, in bytes; no plane: −1
  void* updated;                // (copies · samples, 1, H', W'), contiguous
  int samples, copies;          // of the mask; of the batch for each of them
  int kernel[2], before[2], size[2], out_size[2], stride, dilation;
};

}  // namespace irt
