// What the kernel of gated_conv2d is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "conv2d.h"

namespace irt {

// gain · act(feature + bias) · sigmoid(gate + bias).
struct GatedConv2d {
  Conv2d conv;
  Conv2d::Vector bias;  // of features, then of gates
  int act;
  float alpha, gain;
};

}  // namespace irt
