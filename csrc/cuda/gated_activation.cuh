// gated_activation on the GPU: out = gain · act(f) · sigmoid(g).
//
// Bound by memory: two 16-byte loads and one 16-byte store a thread. One pack a thread and no loop, since at full
// occupancy the loads in flight already cover the latency of device memory, and the tail is one partly idle block.
#pragma once

#include "activation.cuh"
#include "plan/gated_activation.h"

namespace irt {

template <class T, int kPack, class Offset, Act act>
__global__ void __launch_bounds__(GatedActivation<Offset>::kThreads) gated_activation(const GatedActivation<Offset> p) {
  using Params = GatedActivation<Offset>;
  const Offset index = static_cast<Offset>(blockIdx.x) * Params::kThreads + threadIdx.x;
  if (index >= p.count) return;
  Offset at[2];
  p.nest.locate(index, at);
  const Pack<T, kPack> f = load_pack<kPack>(static_cast<const T*>(p.features) + at[Params::kIn]);
  const Pack<T, kPack> g = load_pack<kPack>(static_cast<const T*>(p.gates) + at[Params::kIn]);
  Pack<T, kPack> out;
  IRT_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const float a = activate<T, act>(to_float(f.values[i]), p.alpha);
    from_float(p.gain * a * sigmoid<T>(to_float(g.values[i])), out.values[i]);
  }
  store_pack(static_cast<T*>(p.out) + at[Params::kOut], out);
}

}  // namespace irt
