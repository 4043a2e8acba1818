// What the kernel of sampler_step is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "step.h"

namespace irt {

template <class Offset>
struct SamplerStep {
  StepShape<Offset> shape;
  StepImage<Offset> x, model, known, mask, guidance, next, clean;
  Offset variances;  // from the model's prediction to its variances
  StepNoise<Offset> noise;
  const float* row;
  Offset row_strides[2];     // of samples and of entries
  int prediction, variance;  // as in step_call.h
  float clip;                // infinite: none
};

}  // namespace irt
