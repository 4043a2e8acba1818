// window_mask_update on the GPU: a warp sums a window of the mask and writes its clamped sum to all tokens. A map of
// 64 × 64 tokens is 16 KB: what bounds it is the launch.
#pragma once

#include "common.cuh"
#include "plan/window_mask_update.h"

namespace irt {

template <class T>
__global__ void __launch_bounds__(WindowMaskUpdate::kThreads)
    window_mask_update(const __grid_constant__ WindowMaskUpdate p) {
  using Params = WindowMaskUpdate;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  // In 64 bits, since blocks of 4 windows may go beyond the last of 2³¹ − 1. A warp without a window counts no tokens.
  const long long index = static_cast<long long>(blockIdx.x) * (Params::kThreads / 32) + thread / 32;
  const int tokens = index < p.count ? p.windows.tokens() : 0;
  const Windows::Window here = p.windows.window(tokens ? static_cast<int>(index) : 0);
  const auto at = [&](const Params::Mask& mask, int token) {
    const Windows::Place place = p.windows.place(here, token);
    return static_cast<T*>(mask.data) + here.image * mask.strides[0] + place.row * mask.strides[1] +
           place.column * mask.strides[2];
  };
  float sum = 0.0f;
  for (int token = lane; token < tokens; token += 32) sum += to_float(*at(p.mask, token));
  IRT_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  T updated;
  from_float(sum < 0.0f ? 0.0f : sum > 1.0f ? 1.0f : sum, updated);  // NaN stays
  for (int token = lane; token < tokens; token += 32) *at(p.out, token) = updated;
}

}  // namespace irt
