// The instances of group_norm_silu's kernels that a plan can name (csrc/plan/group_norm_silu.cpp).
#include "cuda/group_norm_silu.cuh"
#include "cuda/launch.h"

#define OFFSETS(T, pack, own)                                  \
  IRT_INSTANCE(irt::group_norm_silu_apply<T, pack, own, int>), \
      IRT_INSTANCE(irt::group_norm_silu_apply<T, pack, own, long long>)
#define TYPE(T, pack)                                                                                  \
  IRT_INSTANCE(irt::plane_moments<T, 1>), IRT_INSTANCE(irt::plane_moments<T, 32>),                     \
      IRT_INSTANCE(irt::group_norm_silu_lines<T, 1>), IRT_INSTANCE(irt::group_norm_silu_lines<T, 32>), \
      OFFSETS(T, pack, false), OFFSETS(T, pack, true), OFFSETS(T, 1, false)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float, 4), TYPE(__half, 8), TYPE(__nv_bfloat16, 8)};
  return list;
}

IRT_CUDA_KERNEL(group_norm_silu, instances)
IRT_CUDA_KERNEL(group_norm_silu_wide, instances)
