// What the kernels of sampler_step and linear_step are given alike: images, and where noise comes from. Read by
// planners (host C++) and kernels (nvcc and NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// A thread takes four consecutive elements of a sample in the order of their indices (C, H, W): one Philox block.
template <class Offset>
struct StepShape {
  static constexpr int kThreads = 256, kElements = 4;

  Offset count;            // of threads that have work
  Offset elements;         // of a sample
  Divisor<Offset> blocks;  // of a sample
  Divisor<Offset> plane;   // H·W
  Divisor<Offset> width;
};

// An operand broadcast to (B, C, H, W): a broadcast dimension has stride 0.
template <class Offset>
struct StepImage {
  const void* data;   // null: absent
  Offset strides[4];  // elements
  bool dense;         // a channel's pixels lie one after the other
  bool packed;        // and four of them, from any multiple of four on, may be moved at once
};

// Two sources of noise: tensors, or seeds and the number of the call.
template <class Offset>
struct StepNoise {
  StepImage<Offset> given;  // the first of `count`
  Offset next;              // from one to the next
  int count;
  const long long* seeds;  // null: none
  Offset seed;             // from one sample's to the next
  unsigned call;
  const void* counter;  // in place of `call`, or null
  bool wide_counter;    // int64, not int32
};

}  // namespace irt
