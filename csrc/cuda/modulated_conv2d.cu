// The instances of modulated_conv2d's kernels that a plan can name (csrc/plan/modulated_conv2d.cpp).
#include "cuda/launch.h"
#include "cuda/modulated_conv2d.cuh"

#define WIDTH(T, products, width) IRT_INSTANCE(irt::modulated_conv2d<T, irt::Products::products, width>)
#define TENSOR(T, products) WIDTH(T, products, 128), WIDTH(T, products, 64), WIDTH(T, products, 16)
#define TYPE(T, pack)                                                              \
  IRT_INSTANCE(irt::conv2d_pack<T>), IRT_INSTANCE(irt::modulated_conv2d_style<T>), \
      IRT_INSTANCE(irt::modulated_conv2d_filter<T, pack>), IRT_INSTANCE(irt::modulated_conv2d_filter<T, 1>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {
      TYPE(float, 4),         TYPE(__half, 8),     TYPE(__nv_bfloat16, 8), WIDTH(float, ieee, 64),
      WIDTH(float, ieee, 16), TENSOR(float, tf32), TENSOR(__half, half),   TENSOR(__nv_bfloat16, half)};
  return list;
}

IRT_CUDA_KERNEL(modulated_conv2d, instances)
