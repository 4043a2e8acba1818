// What the kernel is given that takes mean and deviation of planes: the channels of all samples, in tiles of pixels.
#pragma once

#include "nest.h"

namespace irt {

struct PlaneMoments {
  static constexpr int kThreads = 256;
  static constexpr int kPerThread = 16;  // pixels
  static constexpr int kChannels = 32;   // that a block takes side by side where they are innermost in memory; else one
  IRT_BOTH static constexpr int pixels_of_block(int channels) { return kPerThread * (kThreads / channels); }

  // Of a tile: its rounded mean, what is left of its mean, its root mean square deviation.
  struct Part {
    float mean, rest, deviation;
  };
  // Of a plane, drawn from its parts: (x − mean) · slope + offset.
  struct Line {
    float mean, slope, offset;
  };
  // Shared memory of the kernel.
  struct TileMemory {
    float sums[kThreads], least[kThreads], largest[kThreads];
  };

  const void* data;
  long long strides[4];  // of sample, channel, row, pixel in elements
  int channels, pixels, tiles;
  int first, all;      // the channels are [first, first + channels) of `all` that a sample has planes for
  Divisor<int> width;  // of a row; of all pixels, where they are one row
  long long parts_at;  // in the workspace, in parts: one per tile of each plane
};

}  // namespace irt
