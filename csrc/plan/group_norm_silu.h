// What the kernels of group_norm_silu are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "moments.h"

namespace irt {

// From the moments of tiles to a line per plane. The workspace: a line per plane, then a part per tile of each.
struct GroupNormLines {
  static constexpr int kThreads = 64;

  // Shared memory of the kernel.
  struct Memory {
    double sums[kThreads];
  };
  // A number per channel, or per sample and channel: of x's dtype, or float.
  struct Vector {
    const void* data;      // null: absent
    long long strides[2];  // of sample and channel
    bool single;           // float, whatever x is
  };

  PlaneMoments moments;  // of x; all channels have tiles as these
  int groups, side;      // of a sample; channels of a group
  Vector weight, bias, scale, shift;
  double eps;
};

// The rest. One thread computes one pack: as many neighbouring elements as 16 bytes hold, or a single element.
template <class Offset>
struct GroupNormApply {
  static constexpr int kThreads = 256;
  static constexpr int kOut = 0, kX = 1, kLine = 2;  // operands of the nest

  const void* x;
  void* out;
  Offset count;  // of packs, all of which the nest covers
  Nest<Offset, 3> nest;
  long long first;  // the first line
  bool silu;
};

}  // namespace irt
