// Winograd's F(4×4, 3×3) as an algorithm of fused_conv2d: 3×3 convolutions of stride 1.
//
//   filters:  G g Gᵀ of all filters, 36 matrices Cin × Cout, packed for the product. Transformed on every call: a kept
//             copy would be four times the weights and could be stale.
//   blocks:   a few rows of 4×4 tiles at a time, so that a block's 36 matrices stay near the core:
//             Bᵀd B of all tiles and input channels → 36 products tiles × Cin × Cout → AᵀmA, bias, activation, residual
//
// Rows of the image come in as strips [6 rows][pixel][lane], where padding is written once, and leave as strips of 4
// rows. NCHW or NHWC makes no difference to anything in between (rows.h).
#pragma once

#include "conv.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA::conv {

using winograd::kInputs;
using winograd::kOutputs;
using winograd::kPoints;

constexpr int64_t kTilesPerBlock = 64;  // 64 × 512 channels × 36 floats are 4.7 MB, and the products' heights are full

// Sizes, and the places in the workspace.
struct WinogradGeometry {
  int64_t inputs, outputs, height, width;            // of x, of out
  int64_t in_blocks, out_blocks, panels;             // of channels
  int64_t tiles_x, tiles_y, rows, blocks;            // rows of tiles in a block, blocks in an image
  int64_t tiles;                                     // distance of groups, odd, so that groups do not share cache sets
  int64_t in_point, out_point, filter_point, strip;  // floats between the 36 matrices; of one strip
  int threads;

  explicit WinogradGeometry(const Call& call) {
    inputs = call.x->sizes[1], outputs = call.out->sizes[1], height = call.out->sizes[2], width = call.out->sizes[3];
    in_blocks = ceil_div(inputs, W), out_blocks = ceil_div(outputs, W), panels = ceil_div(out_blocks, kPanelVectors);
    tiles_x = ceil_div(width, kOutputs), tiles_y = ceil_div(height, kOutputs);
    threads = threads_of(call, call.x->sizes[0] * tiles_y);
    const int64_t wanted = ceil_div(tiles_y * tiles_x, kTilesPerBlock);
    blocks = least(tiles_y, ceil_div(most(wanted, 1), threads) * threads);  // as many for each thread
    rows = ceil_div(tiles_y, blocks);
    blocks = ceil_div(tiles_y, rows);
    tiles = rows * tiles_x | 1;
    in_point = (in_blocks * tiles | 1) * W, out_point = (out_blocks * tiles | 1) * W;
    filter_point = panels * inputs * kPanelColumns;
    strip = kInputs * (tiles_x * kOutputs + 2) * W;
  }
  int64_t filter_floats() const { return kPoints * filter_point; }
  int64_t thread_floats() const { return vectors(kPoints * (in_point + out_point) + strip); }
  int64_t floats() const { return vectors(filter_floats()) + threads * thread_floats(); }
};

class Winograd {
 public:
  using Geometry = WinogradGeometry;

  Winograd(const Call& call, const WinogradGeometry& g, float* space)
      : call_(call), g_(g), filters_(space), scratch_(space + vectors(g.filter_floats())) {}

  void run() {
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) transform_filters(o);
    });
    int next = 0;
    parallel_for(call_.x->sizes[0] * g_.blocks, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* inputs = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      float* outputs = inputs + kPoints * g_.in_point;
      float* strip = outputs + kPoints * g_.out_point;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / g_.blocks, first = i % g_.blocks * g_.rows, rows = least(g_.rows, g_.tiles_y - first);
        for (int64_t block = 0; block < g_.in_blocks; ++block) {
          for (int64_t r = 0; r < rows; ++r) transform_inputs(b, first + r, r, block, strip, inputs);
        }
        multiply(rows * g_.tiles_x, inputs, outputs);
        for (int64_t block = 0; block < g_.out_blocks; ++block) {
          for (int64_t r = 0; r < rows; ++r) transform_outputs(b, first + r, r, block, strip, outputs);
        }
      }
    });
  }

 private:
  const Call& call_;
  const WinogradGeometry& g_;
  float *filters_, *scratch_;

  // ---- filters: (Cout, Cin, 3, 3) → [point][panel][Cin][panel's columns], one vector of outputs at a time

  void transform_filters(int64_t o) const {
    const int64_t chunk = W * 9;
    float* to = filters_ + (o / kPanelVectors * g_.inputs * kPanelVectors + o % kPanelVectors) * W;
    alignas(64) float taps[W * 9 * W];  // [channel][tap][lane]
    for (int64_t c = 0; c < g_.inputs; c += W) {
      const int64_t some = least(W, g_.inputs - c);
      for (int64_t j = 0; j < chunk && j < some * 9; j += W) read_taps(o, c, j, least(W, some * 9 - j), taps + j * W);
      for (int64_t k = 0; k < some; ++k) {
        const float* at = taps + k * 9 * W;
        float* target = to + (c + k) * kPanelColumns;
        filter_2d([&](int i, int j) { return load(at + (3 * i + j) * W); },
                  [&](int i, int j, Vec v) { store(target + (kInputs * i + j) * g_.filter_point, v); });
      }
    }
  }

  // 3×3 → 6×6, so not the square transform_2d.
  template <class Get, class Put>
  static void filter_2d(const Get& get, const Put& put) {
    Vec half[kInputs][3];
    for (int j = 0; j < 3; ++j) {
      const Vec column[3] = {get(0, j), get(1, j), get(2, j)};
      Vec result[kInputs];
      winograd::transform_filter(column, result);
      for (int i = 0; i < kInputs; ++i) half[i][j] = result[i];
    }
    for (int i = 0; i < kInputs; ++i) {
      Vec result[kInputs];
      winograd::transform_filter(half[i], result);
      for (int j = 0; j < kInputs; ++j) put(i, j, result[j]);
    }
  }

  // Taps [j, j + some) of the flattened (channel from c, 3, 3) for the outputs of block o, as [tap][lane].
  void read_taps(int64_t o, int64_t c, int64_t j, int64_t some, float* to) const {
    const irt_view& w = *call_.weight;
    const float* data = static_cast<const float*>(w.data) + o * W * w.strides[0] + c * w.strides[1];
    const bool flat = w.strides[3] == 1 && w.strides[2] == 3 && w.strides[1] == 9;
    Vec lanes[W];
    for (int64_t lane = 0; lane < W && o * W + lane < g_.outputs; ++lane) {
      const float* row = data + lane * w.strides[0];
      if (flat) {
        lanes[lane] = some == W ? load(row + j) : load_some(row + j, some);
        continue;
      }
      alignas(64) float values[W] = {};
      for (int64_t i = 0; i < some; ++i) {
        const int64_t tap = (j + i) % 9;
        values[i] = row[(j + i) / 9 * w.strides[1] + tap / 3 * w.strides[2] + tap % 3 * w.strides[3]];
      }
      lanes[lane] = load(values);
    }
    transpose(lanes);
    for (int64_t i = 0; i < some; ++i) store(to + i * W, lanes[i]);
  }

  // ---- inputs

  // The position inside [0, size) that padded position i reads, or −1 for zero.
  int64_t source(int64_t i, int64_t size, int64_t after) const {
    if (i >= 0 && i < size) return i;
    if (call_.padding == Padding::zeros || i >= size + after) return -1;  // beyond: outputs that do not exist
    if (call_.padding == Padding::replicate) return i < 0 ? 0 : size - 1;
    return i < 0 ? -i : 2 * (size - 1) - i;
  }

  void transform_inputs(int64_t b, int64_t tile_y, int64_t r, int64_t block, float* strip, float* to) const {
    const irt_view& x = *call_.x;
    const int64_t pixels = g_.tiles_x * kOutputs + 2, width = x.sizes[3];
    const int64_t inside = least(width, pixels - call_.left);
    for (int64_t i = 0; i < kInputs; ++i) {
      float* row = strip + i * pixels * W;
      const int64_t y = source(tile_y * kOutputs + i - call_.top, x.sizes[2], call_.bottom);
      if (y < 0) {
        for (int64_t p = 0; p < pixels; ++p) store(row + p * W, Vec(0.0f));
        continue;
      }
      read_row(row_of<const float>(x, b, block, y), inside, row + call_.left * W);
      const auto pad = [&](int64_t p) {
        const int64_t from = source(p - call_.left, width, call_.right);
        store(row + p * W, from < 0 ? Vec(0.0f) : load(row + (from + call_.left) * W));
      };
      for (int64_t p = 0; p < call_.left; ++p) pad(p);
      for (int64_t p = call_.left + inside; p < pixels; ++p) pad(p);
    }
    float* target = to + (block * g_.tiles + r * g_.tiles_x) * W;
    for (int64_t t = 0; t < g_.tiles_x; ++t) {
      winograd::transform_2d<kInputs, kInputs>(
          winograd::transform_input, [&](int i, int j) { return load(strip + (i * pixels + kOutputs * t + j) * W); },
          [&](int i, int j, Vec v) { store(target + (kInputs * i + j) * g_.in_point + t * W, v); });
    }
  }

  // ---- products

  void multiply(int64_t tiles, const float* inputs, float* outputs) const {
    const int tail = static_cast<int>(g_.inputs - (g_.in_blocks - 1) * W);
    for (int64_t p = 0; p < kPoints; ++p) {
      const Blocks a = {inputs + p * g_.in_point, g_.tiles * W, static_cast<int>(g_.in_blocks), 1, tail};
      float* to = outputs + p * g_.out_point;
      gemm(a, tiles, filters_ + p * g_.filter_point, static_cast<int>(g_.panels),
           [&](int panel, int64_t tile, int v, Vec sums) {
             const int64_t block = static_cast<int64_t>(panel) * kPanelVectors + v;
             if (block < g_.out_blocks) store(to + (block * g_.tiles + tile) * W, sums);
           });
    }
  }

  // ---- outputs

  void transform_outputs(int64_t b, int64_t tile_y, int64_t r, int64_t block, float* strip, const float* from) const {
    const int64_t pixels = g_.tiles_x * kOutputs;
    const float* source = from + (block * g_.tiles + r * g_.tiles_x) * W;
    const Vec bias = bias_of(call_, block);
    for (int64_t t = 0; t < g_.tiles_x; ++t) {
      Vec half[kOutputs][kInputs];
#pragma GCC unroll 6
      for (int j = 0; j < kInputs; ++j) {
        Vec column[kInputs], result[kOutputs];
#pragma GCC unroll 6
        for (int i = 0; i < kInputs; ++i) column[i] = load(source + (kInputs * i + j) * g_.out_point + t * W);
        winograd::transform_output(column, result);
#pragma GCC unroll 4
        for (int i = 0; i < kOutputs; ++i) half[i][j] = result[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
        Vec result[kOutputs];
        winograd::transform_output(half[i], result);
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) store(strip + (i * pixels + kOutputs * t + j) * W, result[j] + bias);
      }
    }
    const int64_t rows = least(kOutputs, g_.height - tile_y * kOutputs);
    for (int64_t i = 0; i < rows; ++i) {
      finish_row(call_, strip + i * pixels * W, b, block, tile_y * kOutputs + i, 0, call_.out->sizes[3]);
    }
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
