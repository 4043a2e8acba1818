// aot_gate on the GPU: out = x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), by channel. Bound by memory.
//
// Three launches: mean and deviation of tiles of pixels (moments.cuh); from a channel's tiles the line a·gate + b under
// the sigmoid; the blend.
#pragma once

#include "activation.cuh"
#include "moments.cuh"
#include "plan/aot_gate.h"

namespace irt {

// Mean and deviation of a plane from those of its tiles.
template <int kSide>
__global__ void __launch_bounds__(AotGate::kLineThreads) aot_gate_lines(const AotGate p, void* workspace) {
  const PlaneMoments& moments = p.moments;
  AotGate::LineMemory& memory = *reinterpret_cast<AotGate::LineMemory*>(shared_memory());
  const PlaneMoments::Part* parts = static_cast<const PlaneMoments::Part*>(workspace) + moments.parts_at;
  parts += static_cast<long long>(blockIdx.x) * moments.tiles;
  const JoinedTiles<kSide, AotGate::kLineThreads> all(moments, parts, moments.tiles, memory.sums);
  if (threadIdx.x > 0) return;
  const double slope = 10.0 / (sqrt(all.squares / (moments.pixels - 1)) + p.eps);  // one pixel: 0/0, NaN as defined
  const float rounded = static_cast<float>(all.mean);
  const double offset = (static_cast<double>(rounded) - all.mean) * slope - 5.0;
  static_cast<PlaneMoments::Line*>(workspace)[blockIdx.x] = {rounded, static_cast<float>(slope),
                                                             static_cast<float>(offset)};
}

// One pack a thread and no loop; each element has a line of its own, or the pack has one (kOwnLines).
template <class T, int kPack, bool kOwnLines, class Offset>
__global__ void __launch_bounds__(AotBlend<Offset>::kThreads)
    aot_gate_blend(const AotBlend<Offset> p, void* workspace) {
  using Params = AotBlend<Offset>;
  const Offset index = static_cast<Offset>(blockIdx.x) * Params::kThreads + threadIdx.x;
  if (index >= p.count) return;
  Offset at[5];
  p.nest.locate(index, at);
  const Pack<T, kPack> x = load_pack<kPack>(static_cast<const T*>(p.x) + at[Params::kX]);
  const Pack<T, kPack> fuse = load_pack<kPack>(static_cast<const T*>(p.fuse) + at[Params::kFuse]);
  const Pack<T, kPack> gate = load_pack<kPack>(static_cast<const T*>(p.gate) + at[Params::kGate]);
  const PlaneMoments::Line* lines = static_cast<const PlaneMoments::Line*>(workspace) + at[Params::kLine];
  Pack<T, kPack> out;
  IRT_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const PlaneMoments::Line line = lines[kOwnLines ? i : 0];
    const float mask = sigmoid<T>((to_float(gate.values[i]) - line.mean) * line.slope + line.offset);
    const float from = to_float(x.values[i]);
    from_float(from + (to_float(fuse.values[i]) - from) * mask, out.values[i]);
  }
  store_pack(static_cast<T*>(p.out) + at[Params::kOut], out);
}

}  // namespace irt
