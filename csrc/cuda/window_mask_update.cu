// The instances of window_mask_update that a plan can name (csrc/plan/window_mask_update.cpp).
#include "cuda/launch.h"
#include "cuda/window_mask_update.cuh"

static const auto& instances() {
  static const irt::cuda::Instance list[] = {IRT_INSTANCE(irt::window_mask_update<float>),
                                             IRT_INSTANCE(irt::window_mask_update<__half>),
                                             IRT_INSTANCE(irt::window_mask_update<__nv_bfloat16>)};
  return list;
}

IRT_CUDA_KERNEL(window_mask_update, instances)
