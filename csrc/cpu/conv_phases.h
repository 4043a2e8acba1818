// Convolutions between every P-th pixel of an image and all of another: P × P phases, each a convolution of stride 1
// with some of the taps.
#pragma once

#include "conv.h"

namespace irt::INPAINTRT_ISA::conv {

// Whether phases of outputs can be computed of an image that is stored at half the size. (Reflecting the doubled image
// by one pixel repeats the edge of the stored one; by more it is no padding of that.)
static inline bool doubled_by_phases(const Call& call) {
  const int64_t widest = most(most(call.top, call.bottom), most(call.left, call.right));
  return call.upsample > 1 && call.stride == 1 && call.dilation == 1 &&
         (call.padding != Padding::reflect || widest <= 1);
}

// The call as phases of a doubled image read it: there a reflected border is a repeated one.
static inline Call of_stored(Call call) {
  if (call.padding == Padding::reflect) call.padding = Padding::replicate;
  return call;
}

// One dimension of a convolution by phases of its outputs, P·Y + p: of a transposed convolution or a doubled image; any
// other has one phase. Which positions each phase reads, relative to its own times `step`.
struct Axis {
  int64_t phases, step, low = 0, high = 0;  // the least and largest position of all phases
  int count[kLargestStride] = {};
  int64_t at[kLargestStride][kLongestKernel];  // of tap t, rising
  int tap[kLargestStride][kLongestKernel];     // that kernel element i belongs to, or −1

  Axis(const Call& call, int64_t kernel, int64_t before, bool by_phases) {
    const bool doubled = by_phases && call.upsample > 1;
    phases = call.transposed ? call.stride : doubled ? call.upsample : 1;
    step = call.transposed || doubled ? 1 : call.stride;
    bool first = true;
    for (int64_t p = 0; p < phases; ++p) {
      for (int64_t i = 0; i < kernel; ++i) tap[p][i] = -1;
      for (int64_t i = 0; i < kernel; ++i) {
        const int64_t k = call.transposed ? kernel - 1 - i : i;  // so that positions rise
        const int64_t reach = p + (call.transposed ? before - k * call.dilation : k * call.dilation - before);
        if (call.transposed && floor_div(reach, phases) * phases != reach) continue;
        const int64_t position = floor_div(reach, phases);
        if (!count[p] || at[p][count[p] - 1] != position) at[p][count[p]++] = position;
        tap[p][k] = count[p] - 1;
        low = first ? position : least(low, position), high = first ? position : most(high, position);
        first = false;
      }
    }
  }
};

// One dimension of a convolution as Winograd's algorithm computes it, in tiles of m outputs of each phase of outputs
// from m + r − 1 inputs of each phase of inputs:
//
//   plain:    one phase of either.
//   strided:  every second input. Phase s of them meets taps s, s + 2, …, and the phases' products are summed.
//   doubled:  every second output, of a transposed convolution or of one of a doubled image. The phases' tiles read the
//             same inputs: phase p lies `offset` outputs behind the tile's first.
//
// A tile that begins at u has its inputs from in_scale · u + in_first on and its outputs from out_scale · u + out_first
// on; neighbours of a phase are `scale` pixels apart (times the dilation, if it is plain).
struct Tiling {
  static constexpr int kMostPhases = 2;
  static constexpr int64_t kMostTaps = 3, kLongest = kMostPhases * kMostTaps;  // by phases; of a plain one any number

  int64_t inputs = 1, outputs = 1;  // phases; one of them is 1
  int64_t in_scale = 1, out_scale = 1, in_first, out_first = 0;
  int64_t size;  // tiles have to cover [0, size)
  int64_t offset[kMostPhases] = {};
  int64_t taps[kMostPhases] = {};       // of each phase
  int tap[kMostPhases][kLongest] = {};  // that kernel element i belongs to, or −1; not of a plain one

  // Whether there are phases, of few enough taps.
  static bool halves(const Call& call) {
    const bool strided = call.stride == kMostPhases && call.upsample == 1 && call.dilation == 1;
    return (strided || doubled_by_phases(call)) && most(call.kernel_height(), call.kernel_width()) <= kLongest;
  }

  Tiling(const Call& call, int axis, bool by_phases) {
    const int64_t kernel = call.weight->sizes[2 + axis], before = axis ? call.left : call.top;
    size = call.out->sizes[2 + axis], in_first = -before, taps[0] = kernel;
    if (!by_phases) return;
    if (call.transposed || call.upsample > 1) {
      double_outputs(Axis(call, kernel, before, true), kernel);
    } else {
      halve_inputs(kernel);
    }
  }

  int64_t phases() const { return most(inputs, outputs); }
  int64_t most_taps() const { return most(taps[0], taps[1]); }
  // What Winograd's algorithm with n points computes for a phase of at most r taps, if none has less than r − 1: those
  // miss the point ∞, where their filters are 0.
  bool fits(int64_t r) const { return most_taps() == r && least(taps[0], taps[phases() - 1]) >= r - 1; }
  int64_t points(int64_t phase, int64_t n) const { return taps[phase] == most_taps() ? n : n - 1; }
  // A filter of one tap has the same value at all points.
  int64_t values(int64_t phase, int64_t n) const { return taps[phase] == 1 ? 1 : points(phase, n); }

 private:
  void halve_inputs(int64_t kernel) {
    inputs = in_scale = kMostPhases;
    for (int s = 0; s < kMostPhases; ++s) {
      taps[s] = (kernel - s + 1) / kMostPhases;
      for (int i = 0; i < kernel; ++i) tap[s][i] = i % kMostPhases == s ? i / kMostPhases : -1;
    }
  }
  void double_outputs(const Axis& axis, int64_t kernel) {
    const int64_t whole = size;
    outputs = out_scale = kMostPhases, in_first = axis.low, size = 0;
    for (int p = 0; p < kMostPhases; ++p) {
      const int64_t behind = axis.count[p] ? axis.at[p][0] - axis.low : 0;  // of its own outputs, from the tile's first
      out_first = least(out_first, -kMostPhases * behind);
      size = most(size, ceil_div(most(whole - p, 0), kMostPhases) + behind);
      offset[p] = p - kMostPhases * behind, taps[p] = axis.count[p];
      for (int64_t i = 0; i < kernel; ++i) tap[p][i] = axis.tap[p][i];
    }
    for (int64_t& o : offset) o -= out_first;
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
