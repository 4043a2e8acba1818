// The input of a convolution as rows of one image: parts of channels joined, masked, doubled and padded while they are
// read, so that none of these exists in memory.
#pragma once

#include "conv.h"

namespace irt::INPAINTRT_ISA::conv {

template <class T, class AnyLane = LaneOf<T>>
class Source {
 public:
  using Lane = AnyLane;                                      // Single: as floats, whatever they are stored as
  static constexpr int64_t kChannels = W * Lane::kChannels;  // of one block

  // `doubled`: whether to read x as upsampled; an algorithm by phases does that itself.
  Source(const Call& call, bool doubled)
      : call_(call),
        zoom_(doubled ? call.upsample : 1),
        filter_(call.style ? call.style->filter : nullptr),
        height_(filter_ ? call.style->height : call.x->sizes[2] * zoom_),
        width_(filter_ ? call.style->width : call.x->sizes[3] * zoom_) {}

  static int64_t lanes(const Call& call) { return ceil_div(call.inputs(), Lane::kChannels); }
  static int64_t blocks(const Call& call) { return ceil_div(call.inputs(), kChannels); }
  // The lanes that exist in the last block.
  static int tail(const Call& call) { return static_cast<int>(lanes(call) - (blocks(call) - 1) * W); }

  // Pixels [first, first + count) of row y of one block of channels, as [pixel][lane]. Rows and columns count from the
  // unpadded image's corner; what lies beyond the padding is 0.
  void read(int64_t b, int64_t block, int64_t y, int64_t first, int64_t count, float* to) const {
    if (call_.windows) return windows(block, y, first, count, to);
    pixels(b, block, y, first, count, to);
  }

 private:
  const Call& call_;
  int64_t zoom_;
  const Resampling* filter_;
  int64_t height_, width_;

  // Row y of whole windows.
  void windows(int64_t block, int64_t y, int64_t first, int64_t count, float* to) const {
    const int64_t wide = call_.kernel_width(), d = call_.windows->dilation;
    const Windows::Place* place = call_.windows->places + first / wide;
    for (const float* end = to + count * W; to < end; to += wide * W, ++place) {
      const int64_t row = place->y + y * d;
      if (d == 1) {
        pixels(place->b, block, row, place->x, wide, to);
      } else {
        for (int64_t i = 0; i < wide; ++i) pixels(place->b, block, row, place->x + i * d, 1, to + i * W);
      }
    }
  }

  void pixels(int64_t b, int64_t block, int64_t y, int64_t first, int64_t count, float* to) const {
    const int64_t row = origin(y, height_, call_.top, call_.bottom);
    const int64_t begin = least(most(first, 0), first + count);
    const int64_t end = row < 0 ? begin : most(begin, least(first + count, width_));
    if (end > begin) inside(b, block, row, begin, end, to + (begin - first) * W);
    const auto outside = [&](int64_t column) {
      float* pixel = to + (column - first) * W;
      const int64_t from = row < 0 ? -1 : origin(column, width_, call_.left, call_.right);
      if (from < 0) {
        store(pixel, Vec(0.0f));
      } else if (from >= begin && from < end) {
        store(pixel, load(to + (from - first) * W));
      } else {
        inside(b, block, row, from, from + 1, pixel);
      }
    };
    for (int64_t column = first; column < begin; ++column) outside(column);
    for (int64_t column = end; column < first + count; ++column) outside(column);
  }

  // The position in [0, size) that position i reads, or −1 for zero.
  int64_t origin(int64_t i, int64_t size, int64_t before, int64_t after) const {
    if (i >= 0 && i < size) return i;
    if (call_.padding == Padding::zeros || i < -before || i >= size + after) return -1;
    if (call_.padding == Padding::replicate) return i < 0 ? 0 : size - 1;
    return i < 0 ? -i : 2 * (size - 1) - i;
  }

  void inside(int64_t b, int64_t block, int64_t y, int64_t begin, int64_t end, float* to) const {
    if (filter_) return filtered(b, block, y, begin, end, to);
    if (zoom_ == 1) return stored(b, block, y, begin, end, to);
    const int64_t low = begin / 2;
    stored(b, block, y / 2, low, (end - 1) / 2 + 1, to);
    for (int64_t i = end - 1; i >= begin; --i) store(to + (i - begin) * W, load(to + (i / 2 - low) * W));
  }

  void stored(int64_t b, int64_t block, int64_t y, int64_t begin, int64_t end, float* to) const {
    const irt_view* part = call_.x;
    int64_t local = block;
    while (part + 1 < call_.x + call_.parts && local * kChannels >= part->sizes[1]) {
      local -= part->sizes[1] / kChannels;
      ++part;
    }
    read_row<Lane>(row_of<const T, Lane>(*part, b, local, y, begin), end - begin, to);
    if (call_.mask) apply_mask(b, block, y, begin, end, to);
    if (call_.style && call_.style->inputs) {
      const Factors f = factors(b, block);
      for (int64_t i = 0; i < end - begin; ++i) store(to + i * W, f.times(load(to + i * W)));
    }
  }

  // The style's factors of one block of channels.
  struct Factors {
    Vec even, odd;

    Vec times(Vec v) const { return Lane::pack(even * Lane::even(v), odd * Lane::odd(v)); }
  };

  Factors factors(int64_t b, int64_t block) const {
    constexpr int64_t each = Lane::kChannels;
    const int64_t first = block * kChannels, count = least(kChannels, call_.inputs() - first);
    const float* at = call_.style->inputs + b * call_.inputs() + first;
    return {load_some(at, ceil_div(count, each), each), load_some(at + each - 1, count / each, each)};
  }

  void filtered(int64_t b, int64_t block, int64_t y, int64_t begin, int64_t end, float* to) const {
    const irt_view& x = *call_.x;
    const auto read = [&](int64_t row, int64_t first, int64_t count, float* line) {
      read_row<Lane>(row_of<const T, Lane>(x, b, block, row, first), count, line);
    };
    const Resampled<Lane> rows(*filter_, x.sizes[2], x.sizes[3]);
    if (!call_.style->inputs) {
      return rows.row(y, begin, end - begin, 1, to, read, [](Vec even, Vec odd) { return Lane::pack(even, odd); });
    }
    const Factors f = factors(b, block);
    rows.row(y, begin, end - begin, 1, to, read,
             [&](Vec even, Vec odd) { return Lane::pack(even * f.even, odd * f.odd); });
  }

  void apply_mask(int64_t b, int64_t block, int64_t y, int64_t begin, int64_t end, float* to) const {
    const irt_view& m = *call_.mask;
    const int64_t image = m.sizes[0] == 1 ? 0 : b;
    if (m.sizes[1] > 1) {
      constexpr int64_t kSome = 64;
      alignas(64) float factors[kSome * W];
      for (int64_t first = begin; first < end; first += kSome, to += kSome * W) {
        const int64_t some = least(kSome, end - first);
        read_row<Lane>(row_of<const T, Lane>(m, image, block, y, first), some, factors);
        for (int64_t i = 0; i < some; ++i) store(to + i * W, Lane::times(load(to + i * W), load(factors + i * W)));
      }
      return;
    }
    const Row<const T> row = row_of<const T, Lane>(m, image, 0, y, begin);
    for (int64_t i = 0; i < end - begin; ++i) {
      const Vec factor(to_float(row.data[i * row.pixel]));
      store(to + i * W, Lane::times(load(to + i * W), Lane::pack(factor, factor)));
    }
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
