// Rows of tensors in and out of the blocked layout of gemm.h: kWidth lanes of `count` pixels as [pixel][lane].
//
// NHWC data have that layout already; rows of NCHW data are transposed in registers; other strides are gathered.
#pragma once

#include <cstdint>

#include "inpaintrt/abi.h"
#include "lanes.h"

namespace irt::INPAINTRT_ISA {

// One row of one block of channels: `channels` of them exist. Null data: a row of zeros.
template <class T>
struct Row {
  T* data;
  int64_t channels, channel, pixel;  // strides
};

// The row (b, block · n…, y) of a 4-D view, from its pixel `first` on, where n channels are one vector of lanes.
template <class T, class Lane = Single>
static inline Row<T> row_of(const irt_view& x, int64_t b, int64_t block, int64_t y, int64_t first = 0) {
  constexpr int64_t n = Vec::kWidth * Lane::kChannels;
  const int64_t left = x.sizes[1] - block * n;
  T* data = static_cast<T*>(x.data) + b * x.strides[0] + block * n * x.strides[1] + y * x.strides[2];
  data += first * x.strides[3];
  return {data, left < n ? left : n, x.strides[1], x.strides[3]};
}

template <class Lane = Single, class T>
static inline void read_row(const Row<T>& from, int64_t count, float* row) {
  constexpr int64_t W = Vec::kWidth, each = Lane::kChannels;
  int64_t i = 0;
  if (from.channel == 1 && from.channels == W * each) {
    for (; i < count; ++i) {
      const T* pixel = from.data + i * from.pixel;
      __builtin_prefetch(pixel + 2 * W * each, 0, 2);  // callers go through a row once for every vector of channels
      store(row + i * W, Lane::across(pixel, W * each, 1));
    }
  } else if (from.pixel == 1) {
    for (; i + W <= count; i += W) {
      Vec lanes[W];
      for (int64_t c = 0; c < from.channels; c += each) {
        lanes[c / each] = Lane::down(from.data + c * from.channel + i, from.channels - c, from.channel);
      }
      transpose(lanes);
      for (int64_t k = 0; k < W; ++k) store(row + (i + k) * W, lanes[k]);
    }
  }
  for (; i < count; ++i) store(row + i * W, Lane::across(from.data + i * from.pixel, from.channels, from.channel));
}

// to = finish(row, extra), where `extra` is a row like `to` (zeros if it has no data).
template <class T, class Finish>
static inline void write_row(const float* row, int64_t count, const Row<T>& extra, const Row<T>& to,
                             const Finish& finish) {
  constexpr int64_t W = Vec::kWidth;
  const bool more = extra.data != nullptr;
  int64_t i = 0;
  if (to.channel == 1 && to.channels == W && (!more || extra.channel == 1)) {
    for (; i < count; ++i) {
      const Vec other = more ? load(extra.data + i * extra.pixel) : Vec(0.0f);
      store(to.data + i * to.pixel, finish(load(row + i * W), other));
    }
  } else if (to.pixel == 1 && (!more || extra.pixel == 1)) {
    for (; i + W <= count; i += W) {
      Vec lanes[W];
      for (int64_t k = 0; k < W; ++k) lanes[k] = load(row + (i + k) * W);
      transpose(lanes);
      for (int64_t lane = 0; lane < to.channels; ++lane) {
        const Vec other = more ? load(extra.data + lane * extra.channel + i) : Vec(0.0f);
        store(to.data + lane * to.channel + i, finish(lanes[lane], other));
      }
    }
  }
  for (; i < count; ++i) {
    const Vec other = more ? load_some(extra.data + i * extra.pixel, to.channels, extra.channel) : Vec(0.0f);
    store_some(to.data + i * to.pixel, finish(load(row + i * W), other), to.channels, to.channel);
  }
}

}  // namespace irt::INPAINTRT_ISA
