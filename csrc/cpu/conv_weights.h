// Filters as an algorithm wants them: one vector of outputs at a time, [channel][tap][lane], whatever the memory of the
// weight. (Cout, Cin, kh, kw), of transposed convolutions (Cin, Cout, kh, kw); or two of them, one for each part of x.
#pragma once

#include "conv.h"

namespace irt::INPAINTRT_ISA::conv {

template <class T>
class Weights {
 public:
  explicit Weights(const Call& call)
      : filters_(call),
        first_(*call.weight, call.transposed),
        rest_(call.rest ? *call.rest : *call.weight, call.transposed),
        split_(call.rest ? call.weight->sizes[call.transposed ? 0 : 1] : INT64_MAX) {}

  // Whether the weights of one output and one part of x lie one after the other, as [channel][tap].
  bool by_channels() const { return first_.by_channels() && rest_.by_channels(); }
  const T* at(int64_t output, int64_t channel, int64_t tap) const {
    return channel < split_ ? first_.at(output, channel, tap) : rest_.at(output, channel - split_, tap);
  }
  int64_t between_channels(int64_t channel) const { return (channel < split_ ? first_ : rest_).in; }

  // Channels [c, c + some) of the filters of one block.
  void read(int64_t block, int64_t c, int64_t some, float* to) const {
    const int64_t output = filters_.first(block), count = filters_.count(block);
    const int64_t first = most(0, least(some, split_ - c));
    if (first) first_.read(output, count, c, first, to);
    if (first < some) rest_.read(output, count, c + first - split_, some - first, to + first * first_.taps * W);
  }

 private:
  // The weights of one tensor.
  struct Part {
    const T* data;
    int64_t out, in, row, column, width, taps;
    bool dense;     // the taps of a channel lie one after the other
    bool mirrored;  // they do, the last one first

    Part(const irt_view& w, bool transposed) : data(static_cast<const T*>(w.data)) {
      const auto stride = [&](int d) { return w.sizes[d] > 1 ? w.strides[d] : 0; };  // of size 1 it may be any number
      out = stride(transposed ? 1 : 0), in = stride(transposed ? 0 : 1);
      row = stride(2), column = stride(3);
      width = w.sizes[3], taps = w.sizes[2] * w.sizes[3];
      mirrored = column == -1 && row == -width;
      if (mirrored) data -= taps - 1, column = 1, row = width;
      dense = (column == 1 || width == 1) && (row == width || w.sizes[2] == 1);
    }

    bool by_channels() const { return dense && in == taps; }
    const T* at(int64_t output, int64_t channel, int64_t tap) const {
      return data + output * out + channel * in + tap / width * row + tap % width * column;
    }

    // Channels [c, c + some) of `count` outputs from `output` on.
    void read(int64_t output, int64_t count, int64_t c, int64_t some, float* to) const {
      const T* from = data + output * out + c * in;
      if (by_channels()) return copy(from, count, some * taps, to);
      for (int64_t k = 0; k < some; ++k, from += in, to += taps * W) {
        if (dense) {
          copy(from, count, taps, to);
          continue;
        }
        for (int64_t t = 0; t < taps; ++t) {
          store(to + t * W, load_some(from + t / width * row + t % width * column, count, out));
        }
      }
    }

    // n values of each of `count` outputs, which lie one after the other.
    void copy(const T* from, int64_t count, int64_t n, float* to) const {
      for (int64_t j = 0; j < n; j += W) {
        const int64_t some = least(W, n - j);
        Vec lanes[W];
        if (count == W && some == W && !mirrored) {  // in registers
#pragma GCC unroll 16
          for (int64_t lane = 0; lane < W; ++lane) lanes[lane] = load(from + lane * out + j);
          transpose(lanes);
#pragma GCC unroll 16
          for (int64_t i = 0; i < W; ++i) store(to + (j + i) * W, lanes[i]);
          continue;
        }
        for (int64_t lane = 0; lane < count; ++lane) {
          const T* values = from + lane * out + j;
          lanes[lane] = some == W ? load(values) : load_some(values, some);
        }
        transpose(lanes);
        if (mirrored) {
          for (int64_t i = 0; i < some; ++i) {
            const int64_t tap = (j + i) % taps;
            store(to + (j + i - tap + taps - 1 - tap) * W, lanes[i]);
          }
          continue;
        }
        for (int64_t i = 0; i < some; ++i) store(to + (j + i) * W, lanes[i]);
      }
    }
  };

  Filters filters_;
  Part first_, rest_;
  int64_t split_;  // the first channel of `rest_`
};

}  // namespace irt::INPAINTRT_ISA::conv
