// aot_gate on the GPU: out = x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), by channel. Bound by memory.
//
// Three launches: mean and deviation of tiles of pixels; from a channel's tiles the line a·gate + b under the sigmoid;
// the blend. No sum of squares cancels: a tile is centred in registers, first by its rounded mean and then by what that
// left. The rounded mean is kept between the least and the largest value, so that a constant channel has no deviation
// at all, whose rounding eps would magnify; and deviations are divided by the largest before they are squared, so that
// squares neither overflow nor vanish. Tiles are joined in double, three numbers each.
#pragma once

#include "activation.cuh"
#include "plan/aot_gate.h"

namespace irt {

__device__ __forceinline__ unsigned char* aot_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Moments of kPerThread pixels a thread, of kSide neighbouring channels a block. Threads of one channel are kSide
// apart.
template <class T, int kSide>
__global__ void __launch_bounds__(AotGate::kThreads) aot_gate_moments(const AotGate p, void* workspace) {
  constexpr int kThreads = AotGate::kThreads, kMine = AotGate::kPerThread, kPixels = AotGate::pixels_of_block(kSide);
  AotGate::TileMemory& memory = *reinterpret_cast<AotGate::TileMemory*>(aot_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSide;
  const int blocks = (p.channels + kSide - 1) / kSide;
  const int tile = static_cast<int>(blockIdx.x) % p.tiles, block = static_cast<int>(blockIdx.x) / p.tiles;
  const int sample = block / blocks, channel = block % blocks * kSide + lane;
  const int first = tile * kPixels + thread / kSide;
  const int count = p.pixels - tile * kPixels < kPixels ? p.pixels - tile * kPixels : kPixels;
  const bool exists = channel < p.channels;
  const T* gate = static_cast<const T*>(p.gate) + sample * p.strides[0] + channel * p.strides[1];

  float values[kMine], sum = 0.0f, least = 3.402823466e38f, largest = -3.402823466e38f;
  IRT_UNROLL
  for (int k = 0; k < kMine; ++k) {
    const int pixel = first + k * (kThreads / kSide), row = p.width.quotient(pixel);
    values[k] = 0.0f;
    if (!exists || pixel >= p.pixels) continue;
    values[k] = to_float(gate[row * p.strides[2] + (pixel - row * p.width.value) * p.strides[3]]);
    sum += values[k];
    least = fminf(least, values[k]);
    largest = fmaxf(largest, values[k]);
  }
  memory.sums[thread] = sum;
  memory.least[thread] = least;
  memory.largest[thread] = largest;
  for (int half = kThreads / 2; half >= kSide; half /= 2) {
    __syncthreads();
    if (thread < half) {
      memory.sums[thread] += memory.sums[thread + half];
      memory.least[thread] = fminf(memory.least[thread], memory.least[thread + half]);
      memory.largest[thread] = fmaxf(memory.largest[thread], memory.largest[thread + half]);
    }
  }
  __syncthreads();
  least = memory.least[lane];
  largest = memory.largest[lane];
  float mean = memory.sums[lane] / static_cast<float>(count);
  mean = mean < least ? least : mean > largest ? largest : mean;  // NaN passes
  const float scale = fmaxf(fmaxf(largest - mean, mean - least), 1e-37f);

  const auto total = [&](float mine) {  // over the threads of the channel
    __syncthreads();
    memory.sums[thread] = mine;
    for (int half = kThreads / 2; half >= kSide; half /= 2) {
      __syncthreads();
      if (thread < half) memory.sums[thread] += memory.sums[thread + half];
    }
    __syncthreads();
    return memory.sums[lane];
  };
  sum = 0.0f;
  IRT_UNROLL
  for (int k = 0; k < kMine; ++k) {
    if (first + k * (kThreads / kSide) < p.pixels) sum += values[k] -= mean;
  }
  const float rest = total(sum) / static_cast<float>(count);
  sum = 0.0f;
  IRT_UNROLL
  for (int k = 0; k < kMine; ++k) {
    const float scaled = (values[k] - rest) / scale;
    if (first + k * (kThreads / kSide) < p.pixels) sum += scaled * scaled;
  }
  const float deviation = scale * sqrtf(total(sum) / static_cast<float>(count));

  if (!exists || thread >= kSide) return;
  AotGate::Part* parts = static_cast<AotGate::Part*>(workspace) + p.parts_at;
  const long long plane = static_cast<long long>(sample) * p.channels + channel;
  parts[plane * p.tiles + tile] = {mean, rest, deviation};
}

// Mean and deviation of a plane from those of its tiles.
template <int kSide>
__global__ void __launch_bounds__(AotGate::kLineThreads) aot_gate_lines(const AotGate p, void* workspace) {
  constexpr int kThreads = AotGate::kLineThreads, kPixels = AotGate::pixels_of_block(kSide);
  AotGate::LineMemory& memory = *reinterpret_cast<AotGate::LineMemory*>(aot_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const AotGate::Part* parts = static_cast<const AotGate::Part*>(workspace) + p.parts_at;
  parts += static_cast<long long>(blockIdx.x) * p.tiles;

  const auto total = [&](double mine) {  // over all threads
    __syncthreads();
    memory.sums[thread] = mine;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) memory.sums[thread] += memory.sums[thread + half];
    }
    __syncthreads();
    return memory.sums[0];
  };
  const auto pixels = [&](int tile) {
    const int left = p.pixels - tile * kPixels;
    return static_cast<double>(left < kPixels ? left : kPixels);
  };
  double sum = 0.0;
  for (int tile = thread; tile < p.tiles; tile += kThreads) {
    sum += pixels(tile) * (static_cast<double>(parts[tile].mean) + static_cast<double>(parts[tile].rest));
  }
  const double mean = total(sum) / p.pixels;
  sum = 0.0;
  for (int tile = thread; tile < p.tiles; tile += kThreads) {
    const double away = static_cast<double>(parts[tile].mean) - mean + static_cast<double>(parts[tile].rest);
    const double deviation = static_cast<double>(parts[tile].deviation);
    sum += pixels(tile) * (deviation * deviation + away * away);
  }
  const double squares = total(sum);
  if (thread > 0) return;
  const double slope = 10.0 / (sqrt(squares / (p.pixels - 1)) + p.eps);  // one pixel: 0/0, NaN as defined
  const float rounded = static_cast<float>(mean);
  const double offset = (static_cast<double>(rounded) - mean) * slope - 5.0;
  static_cast<AotGate::Line*>(workspace)[blockIdx.x] = {rounded, static_cast<float>(slope), static_cast<float>(offset)};
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
  const AotGate::Line* lines = static_cast<const AotGate::Line*>(workspace) + at[Params::kLine];
  Pack<T, kPack> out;
  IRT_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const AotGate::Line line = lines[kOwnLines ? i : 0];
    const float mask = sigmoid<T>((to_float(gate.values[i]) - line.mean) * line.slope + line.offset);
    const float from = to_float(x.values[i]);
    from_float(from + (to_float(fuse.values[i]) - from) * mask, out.values[i]);
  }
  store_pack(static_cast<T*>(p.out) + at[Params::kOut], out);
}

}  // namespace irt
