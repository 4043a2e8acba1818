// The instances of partial_conv2d's kernels that a plan can name (csrc/plan/conv2d_call.h).
#include "cuda/launch.h"
#include "cuda/partial_conv2d.cuh"

#define WIDTH(T, products, width) IRT_INSTANCE(irt::partial_conv2d<T, irt::Products::products, width>)
#define TENSOR(T, products) WIDTH(T, products, 128), WIDTH(T, products, 64), WIDTH(T, products, 16)
#define TYPE(T)                                                                  \
  IRT_INSTANCE(irt::conv2d_pack<T>), IRT_INSTANCE(irt::partial_conv2d_plane<T>), \
      IRT_INSTANCE(irt::partial_conv2d_sums<T>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float),
                                             TYPE(__half),
                                             TYPE(__nv_bfloat16),
                                             WIDTH(float, ieee, 64),
                                             WIDTH(float, ieee, 16),
                                             TENSOR(float, tf32),
                                             TENSOR(__half, half),
                                             TENSOR(__nv_bfloat16, half)};
  return list;
}

IRT_CUDA_KERNEL(partial_conv2d, instances)
