// The instances of aot_gate's kernels that a plan can name (csrc/plan/aot_gate.cpp).
#include "cuda/aot_gate.cuh"
#include "cuda/launch.h"

#define OFFSETS(T, pack, own) \
  IRT_INSTANCE(irt::aot_gate_blend<T, pack, own, int>), IRT_INSTANCE(irt::aot_gate_blend<T, pack, own, long long>)
#define TYPE(T, pack)                                                                                       \
  IRT_INSTANCE(irt::plane_moments<T, 1>), IRT_INSTANCE(irt::plane_moments<T, 32>), OFFSETS(T, pack, false), \
      OFFSETS(T, pack, true), OFFSETS(T, 1, false)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float, 4), TYPE(__half, 8), TYPE(__nv_bfloat16, 8),
                                             IRT_INSTANCE(irt::aot_gate_lines<1>),
                                             IRT_INSTANCE(irt::aot_gate_lines<32>)};
  return list;
}

IRT_CUDA_KERNEL(aot_gate, instances)
IRT_CUDA_KERNEL(aot_gate_wide, instances)
