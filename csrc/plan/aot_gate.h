// What the kernels of aot_gate are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// The statistics: of tiles of pixels, then of channels. "Planes" are the channels of all samples.
//
// The workspace: a line per plane, then a part per tile of each plane.
struct AotGate {
  static constexpr int kThreads = 256, kLineThreads = 64;
  static constexpr int kPerThread = 16;  // pixels
  static constexpr int kChannels = 32;   // that a block takes side by side where they are innermost in memory; else one
  IRT_BOTH static constexpr int pixels_of_block(int channels) { return kPerThread * (kThreads / channels); }

  // Of a tile: its rounded mean, what is left of its mean, its root mean square deviation.
  struct Part {
    float mean, rest, deviation;
  };
  // Of a plane: the mask's argument is (gate − mean) · slope + offset.
  struct Line {
    float mean, slope, offset;
  };
  // Shared memory of the kernels.
  struct TileMemory {
    float sums[kThreads], least[kThreads], largest[kThreads];
  };
  struct LineMemory {
    double sums[kLineThreads];
  };

  const void* gate;
  long long strides[4];  // of sample, channel, row, pixel in elements
  int channels, pixels, tiles;
  Divisor<int> width;  // of a row; of all pixels, where they are one row
  long long parts_at;  // in the workspace, in lines
  double eps;
};

// The rest. One thread computes one pack: as many neighbouring elements as 16 bytes hold, or a single element.
template <class Offset>
struct AotBlend {
  static constexpr int kThreads = 256;
  static constexpr int kOut = 0, kX = 1, kFuse = 2, kGate = 3, kLine = 4;  // operands of the nest

  const void* x;
  const void* fuse;
  const void* gate;
  void* out;
  Offset count;  // of packs, all of which the nest covers
  Nest<Offset, 5> nest;
};

}  // namespace irt
