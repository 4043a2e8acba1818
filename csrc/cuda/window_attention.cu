// The instances of window_attention that a plan can name (csrc/plan/window_attention.cpp).
#include "cuda/launch.h"
#include "cuda/window_attention.cuh"

#define WIDTH(T, channels) \
  IRT_INSTANCE(irt::window_attention<T, channels>), IRT_INSTANCE(irt::window_attention_biased<T, channels>)
#define TYPE(T) WIDTH(T, 16), WIDTH(T, 32), WIDTH(T, 64)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float), TYPE(__half), TYPE(__nv_bfloat16)};
  return list;
}

IRT_CUDA_KERNEL(window_attention, instances)
