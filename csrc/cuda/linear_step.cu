// The instances of linear_step that a plan can name (csrc/plan/linear_step.cpp).
#include "cuda/launch.h"
#include "cuda/linear_step.cuh"

#define OFFSETS(T) IRT_INSTANCE(irt::linear_step<T, int>), IRT_INSTANCE(irt::linear_step<T, long long>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {OFFSETS(float), OFFSETS(__half), OFFSETS(__nv_bfloat16)};
  return list;
}

IRT_CUDA_KERNEL(linear_step, instances)
IRT_CUDA_KERNEL(linear_step_wide, instances)
