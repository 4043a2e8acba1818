// A call of one of the convolution ops, as the engine's algorithms see it.
//
// fused_conv2d, gated_conv2d, partial_conv2d and modulated_conv2d differ in what surrounds the sums: conv_source.h
// reads the input (concatenation, mask, upsampling, padding), conv_finish.h makes outputs of sums. Between them an
// algorithm computes sums of one or more rows: by one of the algorithms of conv_algorithms.h, which conv_plan.cpp
// chooses.
#pragma once

#include <initializer_list>

#include "activation.h"
#include "inpaintrt/abi.h"
#include "resample.h"
#include "rows.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA::conv {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kLongestKernel = 64, kLargestStride = 8;
constexpr int kMostParts = 2;

enum class Padding { zeros, reflect, replicate };

// What a modulated convolution has beyond others. The numbers are floats, whatever the tensors are.
struct Style {
  const float *inputs, *outputs;  // factors of channels, (B, Cin) and (B, Cout), or null
  const float* noise;             // (planes, H', W'), added before the bias, or null
  int64_t planes;                 // 1 or B
  float gain, clamp;              // of the activation's result; no bound: infinity
  const Resampling* filter;       // x is read through it, or null
  int64_t height, width;          // of x, as it is read through the filter
};

// Windows of images, side by side as one row of an image: window i is what the filter at it reads, and its first pixel
// is pixel i · (the filter's width). A convolution of them whose stride is that width gives one output for each.
struct Windows {
  struct Place {
    int64_t b, y, x;  // image, and where in it the window begins, which may be outside
  };
  const Place* places;
  int64_t dilation;  // between the pixels of a window, as they lie in the image
};

struct Call {
  const irt_view* x;  // `parts` of them, side by side along the channels; the first of two fills whole vectors of lanes
  int parts;
  const irt_view* weight;  // (Cout, Cin, kh, kw)
  const irt_view* rest;    // the second part's weights, where `weight` has the first part's only; or null
  const irt_view *bias, *scale, *shift, *mask, *residual, *out;
  const float *ratio, *valid;  // of partial convolution: planes (B, H', W'), or null
  const Style* style;          // of modulated convolution, or null
  const Windows* windows;      // of x, read in its place without padding; or null
  const Call* beside;          // a 1×1 convolution (x, weight) of the output's own pixels, added to the sums; or null
  int64_t stride, dilation, upsample;
  int64_t top, left, bottom, right;
  Padding padding;
  bool transposed, gated;
  Act act;
  float alpha, gain;
  bool residual_first;  // act(… + residual) instead of act(…) + residual
  bool ieee;            // no algorithm whose rounding error exceeds the direct form's
  bool wide;            // beside bf16 images, weights (which are rounded as they are read) and vectors may be float32
  int threads;
  float* space;    // workspace of the caller's, as large as the algorithm needs it; null: it takes its own
  size_t* needed;  // not null: the algorithm says how many bytes of workspace it needs, and computes nothing

  int64_t batch() const { return out->sizes[0]; }
  int64_t height() const { return out->sizes[2]; }
  int64_t width() const { return out->sizes[3]; }
  int64_t outputs() const { return out->sizes[1]; }
  int64_t inputs() const {
    const int d = transposed ? 0 : 1;
    return weight->sizes[d] + (rest ? rest->sizes[d] : 0);
  }
  int64_t kernel_height() const { return weight->sizes[2]; }
  int64_t kernel_width() const { return weight->sizes[3]; }
};

// The filters in blocks of one vector of sums. Of a gated convolution block 2j holds features and block 2j + 1 the
// gates of the same channels, so that both halves of a panel (gemm.h) are one unit of outputs.
struct Filters {
  int64_t outputs, blocks;
  bool gated;

  explicit Filters(const Call& call) : outputs(call.outputs()), gated(call.gated) {
    blocks = ceil_div(outputs, W) * (gated ? 2 : 1);
  }
  int64_t unit(int64_t block) const { return gated ? block / 2 : block; }
  int64_t first(int64_t block) const { return unit(block) * W + (gated && block % 2 ? outputs : 0); }
  int64_t count(int64_t block) const { return most(0, least(W, outputs - unit(block) * W)); }
};

// Computes the call by the algorithm that is expected to be fastest: the end of each convolution op.
void run(const Call& call, irt_status& status);

// That algorithm, to be run on the call, or on some images of its batch: then they get what they would get among all.
using Runner = void (*)(const Call& call, irt_status& status);
struct Plan {
  Runner run;
  double cost;  // by the planner's model, in its unit of time
  bool exact;   // its rounding error is the direct form's
};
Plan planned(const Call& call);
// What so many windows cost to be computed by themselves (`Windows`), in the same unit.
double cost_of_windows(const Call& call, int64_t count);

// Says which one that is, and which others there are. The result is as it came where there is nothing to compute.
void choose(const Call& call, irt_choice& choice);

// Each thread has scratch memory of its own: no more of them than there are items of work.
static inline int threads_of(const Call& call, int64_t items) {
  return static_cast<int>(most(1, least(call.threads, least(items, 1024))));
}

// Whether the sizes of the workspace can be computed without overflow. What cannot would take terabytes.
static inline bool fits(const Call& call) {
  constexpr int64_t kLongest = int64_t{1} << 28;
  for (const int64_t side : {call.top, call.left, call.bottom, call.right, call.dilation}) {
    if (side > kLongest) return false;
  }
  double pixels = 1, weights = 1;
  for (int d = 0; d < 4; ++d) {
    int64_t longest = call.out->sizes[d];
    for (int i = 0; i < call.parts; ++i) longest = most(longest, call.x[i].sizes[d]);
    if (call.beside) longest = most(longest, call.beside->x->sizes[d]);
    if (longest > kLongest || call.weight->sizes[d] > kLongest) return false;
    if (d > 1) longest += call.dilation * (call.weight->sizes[d] - 1);  // strips hold what a row of outputs reads
    pixels *= static_cast<double>(d ? longest : 1);
    weights *= static_cast<double>(most(call.weight->sizes[d], 16));
    if (call.rest && call.rest->sizes[d] > kLongest) return false;
  }
  return pixels <= 0x1p38 && weights <= 0x1p40;
}

}  // namespace irt::INPAINTRT_ISA::conv
