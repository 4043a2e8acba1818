// Filters as an algorithm wants them: one vector of outputs at a time, [channel][tap][lane], whatever the memory of the
// weight. (Cout, Cin, kh, kw), of transposed convolutions (Cin, Cout, kh, kw); or two of them, one for each part of x.
// Of float32 beside bf16 images they are rounded to bf16 as they are read: what a copy in bf16 would hold.
#pragma once

#include "conv.h"
#include "gemm.h"
#include "lanes.h"

namespace irt::INPAINTRT_ISA::conv {

// T: of the images.
template <class T>
class Weights {
 public:
  explicit Weights(const Call& call)
      : filters_(call),
        first_(*call.weight, call.transposed),
        rest_(call.rest ? *call.rest : *call.weight, call.transposed),
        split_(call.rest ? call.weight->sizes[call.transposed ? 0 : 1] : INT64_MAX),
        wide_(!std::is_same_v<T, float> && call.weight->dtype == IRT_F32) {}

  // Channels [c, c + some) of the filters of one block.
  void read(int64_t block, int64_t c, int64_t some, float* to) const {
    const int64_t output = filters_.first(block), count = filters_.count(block);
    const int64_t first = most(0, least(some, split_ - c));
    if (first) read(first_, output, count, c, first, to);
    if (first < some) read(rest_, output, count, c + first - split_, some - first, to + first * first_.taps * W);
  }

  // ---- for who reads them in their places

  // Whether the weights of one output and one part of x lie one after the other, as [channel][tap].
  bool by_channels() const { return first_.by_channels() && rest_.by_channels(); }
  int64_t between_channels(int64_t channel) const { return (channel < split_ ? first_ : rest_).in; }
  // Number of an element of a part, and its address.
  int64_t place(int64_t output, int64_t channel, int64_t tap) const {
    return channel < split_ ? first_.place(output, channel, tap) : rest_.place(output, channel - split_, tap);
  }
  const char* at(int64_t output, int64_t channel, int64_t tap) const {
    return (channel < split_ ? first_ : rest_).data + place(output, channel, tap) * size();
  }
  // n elements, `stride` apart, the first of them number `i` from an address on, as lanes.
  Vec across(const char* from, int64_t i, int64_t n, int64_t stride) const {
    from += i * size();
    if constexpr (!std::is_same_v<T, float>) {
      if (wide_) return LaneOf<T>::across_rounded(reinterpret_cast<const float*>(from), n, stride);
    }
    return LaneOf<T>::across(reinterpret_cast<const T*>(from), n, stride);
  }
  void fetch(const char* from, int64_t i) const {
    from += i * size();
    __builtin_prefetch(from);
    if (wide_ && LaneOf<T>::kChannels * W * sizeof(float) > 64) __builtin_prefetch(from + 64);
  }

 private:
  // The weights of one tensor.
  struct Part {
    const char* data;
    int64_t before, out, in, row, column, width, taps;
    bool dense;     // the taps of a channel lie one after the other
    bool mirrored;  // they do, the last one first

    Part(const irt_view& w, bool transposed) : data(static_cast<const char*>(w.data)), before(0) {
      const auto stride = [&](int d) { return w.sizes[d] > 1 ? w.strides[d] : 0; };  // of size 1 it may be any number
      out = stride(transposed ? 1 : 0), in = stride(transposed ? 0 : 1);
      row = stride(2), column = stride(3);
      width = w.sizes[3], taps = w.sizes[2] * w.sizes[3];
      mirrored = column == -1 && row == -width;
      if (mirrored) before = taps - 1, column = 1, row = width;
      dense = (column == 1 || width == 1) && (row == width || w.sizes[2] == 1);
    }

    bool by_channels() const { return dense && in == taps; }
    int64_t place(int64_t output, int64_t channel, int64_t tap) const {
      return output * out + channel * in + tap / width * row + tap % width * column - before;
    }
  };

  Filters filters_;
  Part first_, rest_;
  int64_t split_;  // the first channel of `rest_`
  bool wide_;      // the weights are float32, the images are not

  int64_t size() const { return wide_ ? int64_t{sizeof(float)} : int64_t{sizeof(T)}; }

  void read(const Part& part, int64_t output, int64_t count, int64_t c, int64_t some, float* to) const {
    if constexpr (!std::is_same_v<T, float>) {
      if (wide_) return read_as<float>(part, output, count, c, some, to);
    }
    read_as<T>(part, output, count, c, some, to);
  }

  // A vector of weights of dtype S.
  template <class S>
  static Vec as_image(Vec v) {
    return std::is_same_v<S, T> ? v : round_to_bf16(v);
  }

  // Channels [c, c + some) of `count` outputs from `output` on.
  template <class S>
  static void read_as(const Part& part, int64_t output, int64_t count, int64_t c, int64_t some, float* to) {
    const S* from = reinterpret_cast<const S*>(part.data) + part.place(output, c, 0);
    if (part.by_channels()) return copy(part, from, count, some * part.taps, to);
    for (int64_t k = 0; k < some; ++k, from += part.in, to += part.taps * W) {
      if (part.dense) {
        copy(part, from, count, part.taps, to);
        continue;
      }
      for (int64_t t = 0; t < part.taps; ++t) {
        const S* tap = from + t / part.width * part.row + t % part.width * part.column;
        store(to + t * W, as_image<S>(load_some(tap, count, part.out)));
      }
    }
  }

  // n values of each of `count` outputs, which lie one after the other.
  template <class S>
  static void copy(const Part& part, const S* from, int64_t count, int64_t n, float* to) {
    for (int64_t j = 0; j < n; j += W) {
      const int64_t some = least(W, n - j);
      Vec lanes[W];
      if (count == W && some == W && !part.mirrored) {  // in registers
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < W; ++lane) lanes[lane] = load(from + lane * part.out + j);
        transpose(lanes);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) store(to + (j + i) * W, as_image<S>(lanes[i]));
        continue;
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        const S* values = from + lane * part.out + j;
        lanes[lane] = some == W ? load(values) : load_some(values, some);
      }
      transpose(lanes);
      for (int64_t i = 0; i < some; ++i) {
        int64_t at = j + i;
        if (part.mirrored) at += part.taps - 1 - 2 * (at % part.taps);
        store(to + at * W, as_image<S>(lanes[i]));
      }
    }
  }
};

// One vector of outputs of 1×1 filters of so many channels → [lane of inputs][panel's columns]
template <class T>
void pack_pointwise(const Weights<T>& weights, int64_t block, int64_t channels, float* to) {
  using Lane = LaneOf<T>;
  constexpr int64_t kMost = W * Lane::kChannels;
  alignas(64) float filters[kMost * W];
  for (int64_t c = 0; c < channels; c += kMost) {
    const int64_t some = least(kMost, channels - c);
    weights.read(block, c, some, filters);
    for (int64_t k = 0; k < some; k += Lane::kChannels) {
      const Vec second = k + 1 < some ? load(filters + (k + 1) * W) : Vec(0.0f);
      store(to + (c + k) / Lane::kChannels * kPanelColumns, Lane::pack(load(filters + k * W), second));
    }
  }
}

}  // namespace irt::INPAINTRT_ISA::conv
