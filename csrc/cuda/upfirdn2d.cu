// The instances of upfirdn2d that a plan can name (csrc/plan/resample_plan.h).
#include "cuda/launch.h"
#include "cuda/upfirdn2d.cuh"

#define TYPE(T, pack) IRT_INSTANCE(irt::upfirdn2d<T, pack>), IRT_INSTANCE(irt::upfirdn2d<T, 1>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float, 4), TYPE(__half, 8), TYPE(__nv_bfloat16, 8)};
  return list;
}

IRT_CUDA_KERNEL(upfirdn2d, instances)
