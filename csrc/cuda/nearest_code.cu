// The instances of nearest_code's kernels that a plan can name (csrc/plan/nearest_code.cpp).
#include "cuda/launch.h"
#include "cuda/nearest_code.cuh"

static const auto& instances() {
  static const irt::cuda::Instance list[] = {
      IRT_INSTANCE(irt::nearest_code_search<float>), IRT_INSTANCE(irt::nearest_code_search<__half>),
      IRT_INSTANCE(irt::nearest_code_search<__nv_bfloat16>), IRT_INSTANCE(irt::nearest_code_first<128>)};
  return list;
}

IRT_CUDA_KERNEL(nearest_code, instances)
