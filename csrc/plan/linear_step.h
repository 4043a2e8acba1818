// What the kernel of linear_step is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "step.h"

namespace irt {

template <class Offset>
struct LinearStep {
  static constexpr int kMostTerms = 5;

  StepShape<Offset> shape;
  StepImage<Offset> terms[kMostTerms];
  int count;  // of terms
  StepImage<Offset> known, mask, out;
  StepNoise<Offset> noise;
  const float* coefficients;      // of the terms, of noise, of known, of its noise
  Offset coefficient_strides[2];  // of samples and of entries
  float clip;                     // infinite: none
};

}  // namespace irt
