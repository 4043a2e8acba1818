// linear_step on the GPU: a sum of up to five tensors and noise, clamped, with the known region blended in.
//
// Bound by memory. As in sampler_step, a thread takes four elements, and branches are uniform.
#pragma once

#include "plan/linear_step.h"
#include "step.cuh"

namespace irt {

template <class T, class Offset>
__global__ void __launch_bounds__(StepShape<Offset>::kThreads) linear_step(const LinearStep<Offset> p) {
  const Offset index = static_cast<Offset>(blockIdx.x) * StepShape<Offset>::kThreads + threadIdx.x;
  if (index >= p.shape.count) return;
  const StepElements<Offset> e(p.shape, index);
  const float* const table = p.coefficients + e.sample * p.coefficient_strides[0];
  const auto coefficient = [&](int i) { return table[i * p.coefficient_strides[1]]; };

  float y[4] = {}, term[4];
  IRT_UNROLL  // so that no array of parameters is indexed at run time, which would copy it into local memory
  for (int t = 0; t < LinearStep<Offset>::kMostTerms; ++t) {
    if (t >= p.count) break;
    e.template read<T>(p.terms[t], 0, term);
    const float a = coefficient(t);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) y[i] = t == 0 ? a * term[i] : y[i] + a * term[i];
  }
  float mask[4] = {}, z[4] = {}, k[4] = {};
  if (p.known.data) e.template read<T>(p.mask, 0, mask);
  if (p.noise.seeds) {
    step_draw(p.noise, e, mask, z, k);
  } else if (p.noise.count) {
    e.template read<T>(p.noise.given, 0, z);
    if (p.noise.count == 2) e.template read<T>(p.noise.given, p.noise.next, k);
  }
  if (p.noise.seeds || p.noise.count) {
    const float sigma = coefficient(p.count);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) y[i] += sigma * z[i];
  }
  IRT_UNROLL
  for (int i = 0; i < 4; ++i) y[i] = within(y[i], p.clip);
  if (p.known.data) {
    const float scale = coefficient(p.count + 1), sigma = coefficient(p.count + 2);
    const bool noised = p.noise.seeds || p.noise.count == 2;
    e.template read<T>(p.known, 0, term);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float known = noised ? scale * term[i] + sigma * k[i] : scale * term[i];
      y[i] = mask[i] * known + (1.0f - mask[i]) * y[i];
    }
  }
  e.template write<T>(p.out, y);
}

}  // namespace irt
