// fused_conv2d on the GPU: act(scale · sum + shift + bias) and a residual before or after it, on the shared implicit
// GEMM (conv2d.cuh).
#pragma once

#include "conv2d.cuh"
#include "plan/fused_conv2d.h"

namespace irt {

template <class T, Products kProducts, int kOutputs>
__global__ void __launch_bounds__(Conv2d::threads(kOutputs), Conv2d::kResident / Conv2d::threads(kOutputs))
    fused_conv2d(const __grid_constant__ FusedConv2d p, void* workspace) {
  conv2d::run<T, kProducts, kOutputs>(p.conv, workspace, [&p](const float* sums, const Conv2d::Pixel& at, int output) {
    float value = sums[0];
    if (p.scale.data) value *= conv2d::element<T>(p.scale, output);
    if (p.shift.data) value += conv2d::element<T>(p.shift, output);
    if (p.bias.data) value += conv2d::element<T>(p.bias, output);
    float residual = 0.0f;
    if (p.residual.data) {
      const long long* const strides = p.residual.strides;
      residual = to_float(static_cast<const T*>(p.residual.data)[at.sample * strides[0] + output * strides[1] +
                                                                 at.row * strides[2] + at.column * strides[3]]);
    }
    if (p.residual.data && p.residual_first) value += residual;
    value = conv2d::activated<T>(p.act, value, p.alpha);
    return p.residual.data && !p.residual_first ? value + residual : value;
  });
}

}  // namespace irt
