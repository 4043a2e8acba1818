// What the kernels of aot_gate are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "moments.h"

namespace irt {

// From the moments of the gate's tiles to a line per plane. The workspace: a line per plane, then a part per tile of
// each.
struct AotGate {
  static constexpr int kLineThreads = 64;

  // Shared memory of the kernel.
  struct LineMemory {
    double sums[kLineThreads];
  };

  PlaneMoments moments;
  double eps;
};

// The rest. One thread computes one pack: as many neighbouring elements as 16 bytes hold, or a single element.
template <class Offset>
struct AotBlend {
  static constexpr int kThreads = 256;
  static constexpr int kOut = 0, kX = 1, kFuse = 2, kGate = 3, kLine = 4;  // operands of the nest

  const void* x;
  const void* fuse;
  const void* gate;
  void* out;
  Offset count;  // of packs, all of which the nest covers
  Nest<Offset, 5> nest;
};

}  // namespace irt
