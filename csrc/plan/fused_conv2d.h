// What the kernel of fused_conv2d is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "conv2d.h"

namespace irt {

// act(scale · sum + shift + bias + residual), or with the residual after the activation.
struct FusedConv2d {
  Conv2d conv;
  Conv2d::Vector scale, shift, bias;
  Conv2d::Tensor residual;
  bool residual_first;
  int act;
  float alpha;
};

}  // namespace irt
