// Filters as an algorithm wants them: one vector of outputs at a time, [channel][tap][lane], whatever the memory of the
// weight. (Cout, Cin, kh, kw), of transposed convolutions (Cin, Cout, kh, kw).
#pragma once

#include "conv.h"

namespace irt::INPAINTRT_ISA::conv {

template <class T>
class Weights {
 public:
  explicit Weights(const Call& call) : filters_(call), data_(static_cast<const T*>(call.weight->data)) {
    const irt_view& w = *call.weight;
    const auto stride = [&](int d) { return w.sizes[d] > 1 ? w.strides[d] : 0; };  // of size 1 it may be any number
    out_ = stride(call.transposed ? 1 : 0), in_ = stride(call.transposed ? 0 : 1);
    row_ = stride(2), column_ = stride(3);
    width_ = w.sizes[3], taps_ = w.sizes[2] * w.sizes[3];
    mirrored_ = column_ == -1 && row_ == -width_;
    if (mirrored_) data_ -= taps_ - 1, column_ = 1, row_ = width_;
    dense_ = (column_ == 1 || width_ == 1) && (row_ == width_ || w.sizes[2] == 1);
  }

  // Whether the weights of one output lie one after the other, as [channel][tap].
  bool by_channels() const { return dense_ && in_ == taps_; }
  const T* at(int64_t output, int64_t channel, int64_t tap) const {
    return data_ + output * out_ + channel * in_ + tap / width_ * row_ + tap % width_ * column_;
  }
  int64_t between_channels() const { return in_; }

  // Channels [c, c + some) of the filters of one block.
  void read(int64_t block, int64_t c, int64_t some, float* to) const {
    const T* from = data_ + filters_.first(block) * out_ + c * in_;
    const int64_t count = filters_.count(block);
    if (by_channels()) return dense(from, count, some * taps_, to);
    for (int64_t k = 0; k < some; ++k, from += in_, to += taps_ * W) {
      if (dense_) {
        dense(from, count, taps_, to);
        continue;
      }
      for (int64_t t = 0; t < taps_; ++t) {
        store(to + t * W, load_some(from + t / width_ * row_ + t % width_ * column_, count, out_));
      }
    }
  }

 private:
  Filters filters_;
  const T* data_;
  int64_t out_, in_, row_, column_, width_, taps_;
  bool dense_;     // the taps of a channel lie one after the other
  bool mirrored_;  // they do, the last one first

  // n values of each of `count` outputs, which lie one after the other.
  void dense(const T* from, int64_t count, int64_t n, float* to) const {
    for (int64_t j = 0; j < n; j += W) {
      const int64_t some = least(W, n - j);
      Vec lanes[W];
      if (count == W && some == W && !mirrored_) {  // in registers
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < W; ++lane) lanes[lane] = load(from + lane * out_ + j);
        transpose(lanes);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) store(to + (j + i) * W, lanes[i]);
        continue;
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        const T* row = from + lane * out_ + j;
        lanes[lane] = some == W ? load(row) : load_some(row, some);
      }
      transpose(lanes);
      if (mirrored_) {
        for (int64_t i = 0; i < some; ++i) {
          const int64_t tap = (j + i) % taps_;
          store(to + (j + i - tap + taps_ - 1 - tap) * W, lanes[i]);
        }
        continue;
      }
      for (int64_t i = 0; i < some; ++i) store(to + (j + i) * W, lanes[i]);
    }
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
