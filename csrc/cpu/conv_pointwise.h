// 1×1 convolutions as one product, an algorithm of fused_conv2d: some pixels of the image at a time, read into the
// blocked layout, multiplied by the packed weight, and written with bias, activation and residual. Sums and what
// follows are float; bf16 data are multiplied as they are where the CPU does that (lanes.h), else as floats.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {

constexpr int64_t kPixelsPerBlock = 8 * kTileRows;  // whole tiles of the product, whole squares of a transposition

// A call whose images are one row of pixels each, if they lie so in memory: nothing here depends on their shape.
struct Flat {
  irt_view x, out, residual;
  Call call;

  explicit Flat(const Call& given) : x(*given.x), out(*given.out), call(given) {
    residual = given.residual ? *given.residual : out;
    if (!flatten(x) || !flatten(out) || !flatten(residual)) return;
    call.x = &x, call.out = &out, call.residual = given.residual ? &residual : nullptr;
  }
  Flat(const Flat&) = delete;
  Flat& operator=(const Flat&) = delete;

 private:
  static bool flatten(irt_view& view) {
    const int64_t height = view.sizes[2], width = view.sizes[3];
    if (width == 1) {
      view.strides[3] = view.strides[2];
    } else if (height > 1 && view.strides[2] != width * view.strides[3]) {
      return false;
    }
    view.sizes[2] = 1, view.sizes[3] = height * width;
    return true;
  }
};

template <class Lane>
struct PointwiseGeometry {
  int64_t inputs, outputs, height, width;
  int64_t lanes;                          // of inputs
  int64_t in_blocks, out_blocks, panels;  // vectors of lanes, vectors of outputs, panels of those
  int64_t count, blocks;                  // pixels in a block, blocks in a row
  int64_t pixels;                         // distance of groups, odd, so that groups do not share cache sets
  int threads;

  explicit PointwiseGeometry(const Call& call) : threads(threads_of(call, call.x->sizes[0] * call.out->sizes[2])) {
    inputs = call.x->sizes[1], outputs = call.out->sizes[1], height = call.out->sizes[2], width = call.out->sizes[3];
    lanes = ceil_div(inputs, Lane::kChannels), in_blocks = ceil_div(lanes, W);
    out_blocks = ceil_div(outputs, W), panels = ceil_div(out_blocks, kPanelVectors);
    count = least(kPixelsPerBlock, width), blocks = ceil_div(width, count);
    pixels = count | 1;
  }
  int64_t weight_floats() const { return panels * lanes * kPanelColumns; }
  int64_t thread_floats() const { return vectors((in_blocks + out_blocks) * pixels * W); }
  int64_t floats() const { return vectors(weight_floats()) + threads * thread_floats(); }
};

template <class T>
class Pointwise {
 public:
  using Lane = LaneOf<T>;
  using Geometry = PointwiseGeometry<Lane>;

  Pointwise(const Call& call, const Geometry& g, float* space)
      : call_(call), g_(g), weight_(space), scratch_(space + vectors(g.weight_floats())) {}

  void run() {
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) pack(o);
    });
    int next = 0;
    const int64_t rows = call_.x->sizes[0] * g_.height;
    parallel_for(rows * g_.blocks, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* inputs = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / g_.blocks;
        block(row / g_.height, row % g_.height, i % g_.blocks * g_.count, inputs);
      }
    });
  }

 private:
  const Call& call_;
  const Geometry& g_;
  float *weight_, *scratch_;

  // (Cout, Cin) → [panel][lane of inputs][panel's columns], one vector of outputs at a time.
  void pack(int64_t o) const {
    const irt_view& w = *call_.weight;
    const T* data = static_cast<const T*>(w.data) + o * W * w.strides[0];
    float* to = weight_ + (o / kPanelVectors * g_.lanes * kPanelVectors + o % kPanelVectors) * W;
    for (int64_t first = 0; first < g_.lanes; first += W) {
      const int64_t c = first * Lane::kChannels, some = least(W * Lane::kChannels, g_.inputs - c);
      Vec square[W];
      for (int64_t i = 0; i < W && o * W + i < g_.outputs; ++i) {
        square[i] = Lane::across(data + i * w.strides[0] + c * w.strides[1], some, w.strides[1]);
      }
      transpose(square);
      for (int64_t i = 0; i < least(W, g_.lanes - first); ++i) store(to + (first + i) * kPanelColumns, square[i]);
    }
  }

  void block(int64_t b, int64_t y, int64_t first, float* inputs) const {
    const int64_t count = least(g_.count, g_.width - first);
    float* outputs = inputs + g_.in_blocks * g_.pixels * W;
    for (int64_t c = 0; c < g_.in_blocks; ++c) {
      read_row<Lane>(row_of<const T, Lane>(*call_.x, b, c, y, first), count, inputs + c * g_.pixels * W);
    }
    const int tail = static_cast<int>(g_.lanes - (g_.in_blocks - 1) * W);
    const Blocks a = {inputs, g_.pixels * W, static_cast<int>(g_.in_blocks), 1, tail};
    const auto end = [&](int panel, int64_t pixel, int v, Vec sums) {
      const int64_t o = static_cast<int64_t>(panel) * kPanelVectors + v;
      if (o < g_.out_blocks) store(outputs + (o * g_.pixels + pixel) * W, sums);
    };
    gemm<Lane>(a, count, weight_, static_cast<int>(g_.panels), end);
    for (int64_t o = 0; o < g_.out_blocks; ++o) {
      const Vec bias = bias_of<T>(call_, o);
      float* block = outputs + o * g_.pixels * W;
      for (int64_t i = 0; call_.bias && i < count; ++i) store(block + i * W, load(block + i * W) + bias);
      finish_row<T>(call_, block, b, o, y, first, count);
    }
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
