// The instances of contextual_attention's kernels that a plan can name (csrc/plan/contextual_attention.cpp).
#include "cuda/contextual_attention.cuh"
#include "cuda/launch.h"

#define TYPE(T)                                                                                                   \
  IRT_INSTANCE(irt::contextual_attention_squares<T>), IRT_INSTANCE(irt::contextual_attention_gram<T>),            \
      IRT_INSTANCE(irt::contextual_attention_paste<T, 32>), IRT_INSTANCE(irt::contextual_attention_paste<T, 64>), \
      IRT_INSTANCE(irt::contextual_attention_finish<T>)
#define CHOICE(yes) \
  IRT_INSTANCE(irt::contextual_attention_keys<yes>), IRT_INSTANCE(irt::contextual_attention_weights<yes>)

static const auto& instances() {
  static const irt::cuda::Instance list[] = {TYPE(float), TYPE(__half), TYPE(__nv_bfloat16), CHOICE(false),
                                             CHOICE(true)};
  return list;
}

IRT_CUDA_KERNEL(contextual_attention, instances)
IRT_CUDA_KERNEL(contextual_attention_small, instances)
