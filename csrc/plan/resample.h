// What the kernels that resample by a FIR filter are given. Read by the planners (host C++) and the kernels (nvcc and
// NVRTC).
#pragma once

#include "conv2d.h"

namespace irt {

// gain · act(factor · Σ f · image + strength · noise + bias), bounded; the image is enlarged by zeros, padded and read
// in steps. A thread makes one pixel of one channel, or of a pack of channels that are neighbours in memory.
struct Resample {
  static constexpr int kThreads = 256;

  // Output i of an axis begins at i · step + offset of the enlarged axis, which is lifted by `lifted` samples so that
  // no number that is divided is negative.
  struct Axis {
    Divisor<int> up;
    int step, offset, lifted, taps, size;

    struct Reach {
      int tap, sample;  // the first tap that meets a sample, and that sample; every `up`-th meets the ones after it
    };
    IRT_BOTH Reach reach(int i) const {
      const int at = i * step + offset, whole = up.quotient(at), rest = at - whole * up.value;
      return rest ? Reach{up.value - rest, whole + 1 - lifted} : Reach{0, whole - lifted};
    }
  };

  Conv2d::Tensor image;
  void* out;
  long long image_at, out_at;  // where they lie in the workspace, in bytes, if they have no pointer
  long long out_strides[4];
  const float* filter;  // none: 1
  long long filter_strides[2];
  Axis rows, columns;
  bool inner;  // channels are the innermost dimension of what threads are counted by; else columns are
  Divisor<int>
      sizes[3];  // of these dimensions, innermost first: (channel packs, columns, rows) or (columns, rows, channels)
  int count;     // of threads

  Conv2d::Tensor noise;  // of one channel; may be absent, as the next two
  const void* strength;
  Conv2d::Vector bias;
  float factor, alpha, gain, bound;  // no bound: infinity
  int act;
};

}  // namespace irt
