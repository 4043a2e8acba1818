// The instances of gated_activation that a plan can name (csrc/plan/gated_activation.cpp).
#include "cuda/gated_activation.cuh"
#include "cuda/launch.h"

#define ACTIVATIONS(T, pack, Offset)                                              \
  IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::none>),           \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::relu>),       \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::leaky_relu>), \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::elu>),        \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::silu>),       \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::sigmoid>),    \
      IRT_INSTANCE(irt::gated_activation<T, pack, Offset, irt::Act::tanh>)
#define LAYOUTS(T, pack) \
  ACTIVATIONS(T, pack, int), ACTIVATIONS(T, pack, long long), ACTIVATIONS(T, 1, int), ACTIVATIONS(T, 1, long long)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {LAYOUTS(float, 4), LAYOUTS(__half, 8), LAYOUTS(__nv_bfloat16, 8)};
  return list;
}

IRT_CUDA_KERNEL(gated_activation, instances)
IRT_CUDA_KERNEL(gated_activation_wide, instances)
