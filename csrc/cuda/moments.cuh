// Mean and deviation of tiles of pixels, and sums over a block.
//
// No sum of squares cancels: a tile is centred in registers, first by its rounded mean and then by what that left. The
// rounded mean is kept between the least and the largest value, so that a constant channel has no deviation at all,
// whose rounding eps would magnify; and deviations are divided by the largest before they are squared, so that squares
// neither overflow nor vanish.
#pragma once

#include "common.cuh"
#include "plan/moments.h"

namespace irt {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Moments of kPerThread pixels a thread, of kSide neighbouring channels a block. Threads of one channel are kSide
// apart.
template <class T, int kSide>
__global__ void __launch_bounds__(PlaneMoments::kThreads, 3) plane_moments(const PlaneMoments p, void* workspace) {
  constexpr int kThreads = PlaneMoments::kThreads, kMine = PlaneMoments::kPerThread,
                kPixels = PlaneMoments::pixels_of_block(kSide);
  PlaneMoments::TileMemory& memory = *reinterpret_cast<PlaneMoments::TileMemory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSide;
  const int blocks = (p.channels + kSide - 1) / kSide;
  const int tile = static_cast<int>(blockIdx.x) % p.tiles, block = static_cast<int>(blockIdx.x) / p.tiles;
  const int sample = block / blocks, channel = block % blocks * kSide + lane;
  const int first = tile * kPixels + thread / kSide;
  const int count = p.pixels - tile * kPixels < kPixels ? p.pixels - tile * kPixels : kPixels;
  const bool exists = channel < p.channels;
  const T* from = static_cast<const T*>(p.data) + sample * p.strides[0] + channel * p.strides[1];

  float values[kMine], sum = 0.0f, least = 3.402823466e38f, largest = -3.402823466e38f;
  IRT_UNROLL
  for (int k = 0; k < kMine; ++k) {
    const int pixel = first + k * (kThreads / kSide), row = p.width.quotient(pixel);
    values[k] = 0.0f;
    if (!exists || pixel >= p.pixels) continue;
    values[k] = to_float(from[row * p.strides[2] + (pixel - row * p.width.value) * p.strides[3]]);
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
  PlaneMoments::Part* parts = static_cast<PlaneMoments::Part*>(workspace) + p.parts_at;
  const long long plane = static_cast<long long>(sample) * p.all + p.first + channel;
  parts[plane * p.tiles + tile] = {mean, rest, deviation};
}

// The sum of `mine` over all kThreads of a block, in each of them.
template <int kThreads>
__device__ __forceinline__ double block_sum(double mine, double (&sums)[kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  sums[thread] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  return sums[0];
}

// Tiles [0, count), of which those of a plane follow each other: a group of planes, or one. Joined in double.
template <int kSide, int kThreads>
struct JoinedTiles {
  double mean, squares;  // squares: the sum of squared deviations

  __device__ __forceinline__ JoinedTiles(const PlaneMoments& p, const PlaneMoments::Part* parts, int count,
                                         double (&memory)[kThreads]) {
    constexpr int kPixels = PlaneMoments::pixels_of_block(kSide);
    const int thread = static_cast<int>(threadIdx.x);
    const auto pixels = [&](int tile) {
      const int left = p.pixels - tile % p.tiles * kPixels;
      return static_cast<double>(left < kPixels ? left : kPixels);
    };
    double sum = 0.0;
    for (int tile = thread; tile < count; tile += kThreads) {
      sum += pixels(tile) * (static_cast<double>(parts[tile].mean) + static_cast<double>(parts[tile].rest));
    }
    mean = block_sum(sum, memory) / (static_cast<double>(count / p.tiles) * p.pixels);
    sum = 0.0;
    for (int tile = thread; tile < count; tile += kThreads) {
      const double away = static_cast<double>(parts[tile].mean) - mean + static_cast<double>(parts[tile].rest);
      const double deviation = static_cast<double>(parts[tile].deviation);
      sum += pixels(tile) * (deviation * deviation + away * away);
    }
    squares = block_sum(sum, memory);
  }
};

}  // namespace irt
