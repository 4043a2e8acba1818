// 1×1 convolutions as one product, an algorithm of fused_conv2d: some rows of the image at a time, read into the
// blocked layout, multiplied by the packed weight, and written with bias, activation and residual.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {

constexpr int64_t kPixelsPerBlock = 4 * kTileRows;  // at least: the weight is read once for that many

struct PointwiseGeometry {
  int64_t inputs, outputs, height, width;
  int64_t in_blocks, out_blocks, panels;  // of channels
  int64_t rows, blocks;                   // rows of the image in a block, blocks in an image
  int64_t pixels;                         // distance of groups, odd, so that groups do not share cache sets
  int threads;

  explicit PointwiseGeometry(const Call& call) : threads(call.threads > 1 ? call.threads : 1) {
    inputs = call.x->sizes[1], outputs = call.out->sizes[1], height = call.out->sizes[2], width = call.out->sizes[3];
    in_blocks = ceil_div(inputs, W), out_blocks = ceil_div(outputs, W), panels = ceil_div(out_blocks, kPanelVectors);
    rows = least(ceil_div(height, threads), ceil_div(kPixelsPerBlock, width));
    blocks = ceil_div(height, rows);
    pixels = rows * width | 1;
  }
  int64_t weight_floats() const { return panels * inputs * kPanelColumns; }
  int64_t thread_floats() const { return vectors((in_blocks + out_blocks) * pixels * W); }
  int64_t floats() const { return vectors(weight_floats()) + threads * thread_floats(); }
};

class Pointwise {
 public:
  Pointwise(const Call& call, const PointwiseGeometry& g, float* space)
      : call_(call), g_(g), weight_(space), scratch_(space + vectors(g.weight_floats())) {}

  void run() {
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) pack(o);
    });
    int next = 0;
    parallel_for(call_.x->sizes[0] * g_.blocks, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* inputs = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      for (int64_t i = begin; i < end; ++i) block(i / g_.blocks, i % g_.blocks * g_.rows, inputs);
    });
  }

 private:
  const Call& call_;
  const PointwiseGeometry& g_;
  float *weight_, *scratch_;

  // (Cout, Cin) → [panel][Cin][panel's columns], one vector of outputs at a time.
  void pack(int64_t o) const {
    const irt_view& w = *call_.weight;
    const float* data = static_cast<const float*>(w.data) + o * W * w.strides[0];
    float* to = weight_ + (o / kPanelVectors * g_.inputs * kPanelVectors + o % kPanelVectors) * W;
    for (int64_t c = 0; c < g_.inputs; c += W) {
      const int64_t some = least(W, g_.inputs - c);
      Vec lanes[W];
      for (int64_t lane = 0; lane < W && o * W + lane < g_.outputs; ++lane) {
        const float* row = data + lane * w.strides[0] + c * w.strides[1];
        lanes[lane] = some == W && w.strides[1] == 1 ? load(row) : load_some(row, some, w.strides[1]);
      }
      transpose(lanes);
      for (int64_t i = 0; i < some; ++i) store(to + (c + i) * kPanelColumns, lanes[i]);
    }
  }

  void block(int64_t b, int64_t first, float* inputs) const {
    const int64_t rows = least(g_.rows, g_.height - first);
    float* outputs = inputs + g_.in_blocks * g_.pixels * W;
    for (int64_t c = 0; c < g_.in_blocks; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        float* row = inputs + (c * g_.pixels + r * g_.width) * W;
        read_row(row_of<const float>(*call_.x, b, c, first + r), g_.width, row);
      }
    }
    const int tail = static_cast<int>(g_.inputs - (g_.in_blocks - 1) * W);
    const Blocks a = {inputs, g_.pixels * W, static_cast<int>(g_.in_blocks), 1, tail};
    gemm(a, rows * g_.width, weight_, static_cast<int>(g_.panels), [&](int panel, int64_t pixel, int v, Vec sums) {
      const int64_t o = static_cast<int64_t>(panel) * kPanelVectors + v;
      if (o < g_.out_blocks) store(outputs + (o * g_.pixels + pixel) * W, sums);
    });
    for (int64_t o = 0; o < g_.out_blocks; ++o) {
      const Vec bias = bias_of(call_, o);
      float* block = outputs + o * g_.pixels * W;
      for (int64_t i = 0; call_.bias && i < rows * g_.width; ++i) store(block + i * W, load(block + i * W) + bias);
      for (int64_t r = 0; r < rows; ++r) finish_row(call_, block + r * g_.width * W, b, o, first + r);
    }
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
