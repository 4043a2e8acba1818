// The instances of sampler_step that a plan can name (csrc/plan/sampler_step.cpp).
#include "cuda/launch.h"
#include "cuda/sampler_step.cuh"

#define OFFSETS(T) IRT_INSTANCE(irt::sampler_step<T, int>), IRT_INSTANCE(irt::sampler_step<T, long long>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {OFFSETS(float), OFFSETS(__half), OFFSETS(__nv_bfloat16)};
  return list;
}

IRT_CUDA_KERNEL(sampler_step, instances)
IRT_CUDA_KERNEL(sampler_step_wide, instances)
