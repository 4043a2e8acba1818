// group_norm_silu on the GPU: out = act((x − mean) · slope + offset), by channel; mean and variance are a group's.
//
// Bound by memory. Three launches: mean and deviation of tiles of pixels (moments.cuh), so that even at batch 1
// hundreds of blocks read x; from a group's tiles a line for each of its channels; the rest. Where x is two tensors,
// each has the first and the last launch for itself.
#pragma once

#include "activation.cuh"
#include "moments.cuh"
#include "plan/group_norm_silu.h"

namespace irt {

template <class T>
__device__ __forceinline__ double channel_number(const GroupNormLines::Vector& vector, int sample, int channel,
                                                 double absent) {
  if (!vector.data) return absent;
  const long long at = sample * vector.strides[0] + channel * vector.strides[1];
  return vector.single ? static_cast<double>(static_cast<const float*>(vector.data)[at])
                       : static_cast<double>(to_float(static_cast<const T*>(vector.data)[at]));
}

template <class T, int kSide>
__global__ void __launch_bounds__(GroupNormLines::kThreads)
    group_norm_silu_lines(const GroupNormLines p, void* workspace) {
  GroupNormLines::Memory& memory = *reinterpret_cast<GroupNormLines::Memory*>(shared_memory());
  const int sample = static_cast<int>(blockIdx.x) / p.groups;
  const int first = static_cast<int>(blockIdx.x) % p.groups * p.side;
  const int plane = sample * p.moments.all + first;
  const PlaneMoments::Part* parts = static_cast<const PlaneMoments::Part*>(workspace) + p.moments.parts_at;
  const JoinedTiles<kSide, GroupNormLines::kThreads> group(p.moments, parts + plane * p.moments.tiles,
                                                           p.side * p.moments.tiles, memory.sums);
  const double size = static_cast<double>(p.side) * p.moments.pixels;
  const double steep = rsqrt(group.squares / size + p.eps);
  const float rounded = static_cast<float>(group.mean);
  const double away = static_cast<double>(rounded) - group.mean;
  for (int own = static_cast<int>(threadIdx.x); own < p.side; own += GroupNormLines::kThreads) {
    const int channel = first + own;
    const double film = 1.0 + channel_number<T>(p.scale, sample, channel, 0.0);
    const double slope = steep * channel_number<T>(p.weight, sample, channel, 1.0) * film;
    const double addend =
        channel_number<T>(p.bias, sample, channel, 0.0) * film + channel_number<T>(p.shift, sample, channel, 0.0);
    // The mean of floats is no float in general. Of an infinite weight the sign of what is lost means nothing.
    const double lost = fabs(slope) > 1.7976931348623157e308 ? 0.0 : away * slope;
    static_cast<PlaneMoments::Line*>(workspace)[plane + own] = {rounded, static_cast<float>(slope),
                                                                static_cast<float>(addend + lost)};
  }
}

// One pack a thread and no loop; each element has a line of its own, or the pack has one (kOwnLines).
template <class T, int kPack, bool kOwnLines, class Offset>
__global__ void __launch_bounds__(GroupNormApply<Offset>::kThreads)
    group_norm_silu_apply(const GroupNormApply<Offset> p, void* workspace) {
  using Params = GroupNormApply<Offset>;
  const Offset index = static_cast<Offset>(blockIdx.x) * Params::kThreads + threadIdx.x;
  if (index >= p.count) return;
  Offset at[3];
  p.nest.locate(index, at);
  const Pack<T, kPack> x = load_pack<kPack>(static_cast<const T*>(p.x) + at[Params::kX]);
  const PlaneMoments::Line* lines = static_cast<const PlaneMoments::Line*>(workspace) + p.first + at[Params::kLine];
  Pack<T, kPack> out;
  IRT_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const PlaneMoments::Line line = lines[kOwnLines ? i : 0];
    const float value = fmaf(to_float(x.values[i]) - line.mean, line.slope, line.offset);
    from_float(p.silu ? activate<T, Act::silu>(value, 0.0f) : value, out.values[i]);
  }
  store_pack(static_cast<T*>(p.out) + at[Params::kOut], out);
}

}  // namespace irt
