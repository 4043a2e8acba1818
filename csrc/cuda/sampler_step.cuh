// sampler_step on the GPU: prediction, posterior, noise, undo steps and the known region in one pass.
//
// Large images are bound by memory: 25 bytes an element with a known region, four elements a thread. Small ones by the
// launch. What a call asks for is the same for all threads, so its branches are uniform and need no instances.
#pragma once

#include "plan/sampler_step.h"
#include "step.cuh"

namespace irt {

template <class T, class Offset>  // T: the model's dtype
__global__ void __launch_bounds__(StepShape<Offset>::kThreads) sampler_step(const SamplerStep<Offset> p) {
  const Offset index = static_cast<Offset>(blockIdx.x) * StepShape<Offset>::kThreads + threadIdx.x;
  if (index >= p.shape.count) return;
  const StepElements<Offset> e(p.shape, index);
  const float* const row = p.row + e.sample * p.row_strides[0];
  const auto entry = [&](int i) { return row[i * p.row_strides[1]]; };

  float x[4], made[4], x0[4], log_variance[4], y[4];
  e.template read<float>(p.x, 0, x);
  e.template read<T>(p.model, 0, made);
  const float scale = entry(0), part = entry(1), coef_x0 = entry(2), coef_x = entry(3);
  const float min_log = entry(4), max_log = entry(5);
  if (p.variance != 2) e.template read<T>(p.model, p.variances, log_variance);
  IRT_UNROLL
  for (int i = 0; i < 4; ++i) {
    x0[i] = p.prediction == 0   ? scale * x[i] - part * made[i]
            : p.prediction == 1 ? made[i]
                                : (x[i] - part * made[i]) / scale;
    x0[i] = within(x0[i], p.clip);
    if (p.variance == 0) {
      const float share = (log_variance[i] + 1.0f) * 0.5f;
      log_variance[i] = share * max_log + (1.0f - share) * min_log;
    } else if (p.variance == 2) {
      log_variance[i] = min_log;
    }
    y[i] = coef_x0 * x0[i] + coef_x * x[i];
  }
  e.template write<float>(p.clean, x0);
  if (p.guidance.data) {
    float gradient[4];
    e.template read<float>(p.guidance, 0, gradient);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) y[i] += expf(log_variance[i]) * gradient[i];
  }

  const float nonzero = entry(6), undo_scale = entry(7), undo_var = entry(8);
  const bool blend = p.known.data && entry(11) != 0.0f;
  float mask[4] = {}, z[4] = {}, k[4] = {};
  if (blend) e.template read<float>(p.mask, 0, mask);
  if (p.noise.seeds) {
    step_draw(p.noise, e, mask, z, k);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float spread = nonzero * undo_scale * undo_scale * expf(log_variance[i]) + undo_var;
      y[i] = undo_scale * y[i] + sqrtf(spread) * z[i];
    }
  } else {
    e.template read<float>(p.noise.given, 0, z);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) y[i] += nonzero * expf(0.5f * log_variance[i]) * z[i];
    if (p.noise.count == 3) {
      e.template read<float>(p.noise.given, p.noise.next, z);
      const float undone = sqrtf(undo_var);
      IRT_UNROLL
      for (int i = 0; i < 4; ++i) y[i] = undo_scale * y[i] + undone * z[i];
      if (blend) e.template read<float>(p.noise.given, 2 * p.noise.next, k);
    }
  }
  if (blend) {
    const float known_scale = entry(9), known_sigma = entry(10);
    float known[4];
    e.template read<float>(p.known, 0, known);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) {
      y[i] = mask[i] * (known_scale * known[i] + known_sigma * k[i]) + (1.0f - mask[i]) * y[i];
    }
  }
  e.template write<float>(p.next, y);
}

}  // namespace irt
