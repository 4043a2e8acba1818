// gated_conv2d on the GPU: gain · act(f) · sigmoid(g), f and g being the halves of a tile of the shared implicit GEMM
// (conv2d.cuh): C channels are written instead of 2C.
#pragma once

#include "conv2d.cuh"
#include "plan/gated_conv2d.h"

namespace irt {

template <class T, Products kProducts, int kOutputs>
__global__ void __launch_bounds__(Conv2d::threads(kOutputs), Conv2d::kResident / Conv2d::threads(kOutputs))
    gated_conv2d(const __grid_constant__ GatedConv2d p, void* workspace) {
  conv2d::run<T, kProducts, kOutputs>(p.conv, workspace, [&p](const float* sums, const Conv2d::Pixel&, int output) {
    float feature = sums[0], gate = sums[kOutputs / 2];
    if (p.bias.data) {
      feature += conv2d::element<T>(p.bias, output);
      gate += conv2d::element<T>(p.bias, output + p.conv.outputs);
    }
    return p.gain * conv2d::activated<T>(p.act, feature, p.alpha) * sigmoid<T>(gate);
  });
}

}  // namespace irt
