// The instances of fourier_unit's kernels that a plan can name (csrc/plan/fourier_unit.cpp).
#include "cuda/fourier_unit.cuh"
#include "cuda/launch.h"

#define ROWS(T) IRT_INSTANCE(irt::fourier_unit_rows<T>), IRT_INSTANCE(irt::fourier_unit_inverse_rows<T>)
#define MIX(per_lane) IRT_INSTANCE(irt::fourier_unit_columns<per_lane>), IRT_INSTANCE(irt::fourier_unit_mix<per_lane>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {ROWS(float),
                                             ROWS(__half),
                                             ROWS(__nv_bfloat16),
                                             MIX(1),
                                             MIX(2),
                                             IRT_INSTANCE(irt::fourier_unit_transform<false>),
                                             IRT_INSTANCE(irt::fourier_unit_transform<true>)};
  return list;
}

IRT_CUDA_KERNEL(fourier_unit, instances)
IRT_CUDA_KERNEL(fourier_unit_unfused, instances)
