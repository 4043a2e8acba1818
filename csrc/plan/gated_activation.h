// What the kernel of gated_activation is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// One thread computes one pack: as many neighbouring elements as 16 bytes hold, or a single element.
template <class Offset>
struct GatedActivation {
  static constexpr int kThreads = 256;
  static constexpr int kOut = 0, kIn = 1;  // operands of the nest

  const void* features;
  const void* gates;  // strides as the features
  void* out;
  Offset count;  // of packs, all of which the nest covers
  Nest<Offset, 2> nest;
  float alpha, gain;
};

}  // namespace irt
