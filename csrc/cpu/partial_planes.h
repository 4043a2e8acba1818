// What partial_conv2d makes of its mask before any output is computed: planes of the windows' sums and what follows
// from them.
//
// The sum over a window does not depend on the output channel, so the mask's channels are summed to one plane first,
// each number read once; that plane is summed over windows by rows and then columns. Whether all channels are alike, as
// those of most models' masks are, shows on the way: then one of them is what x is multiplied with.
#pragma once

#include <cmath>

#include "conv.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA {

template <class T>
class MaskPlanes {
 public:
  MaskPlanes(const conv::Call& call, double window, double eps)
      : call_(call), window_(static_cast<float>(window)), eps_(static_cast<float>(eps)) {}

  // Ratio and valid of all images; of all masks the sums of windows and of channels, one channel by itself, the least
  // and largest sum of each row, the limit below which a sum is thin and how many are; and a line per thread.
  int64_t floats() const {
    return 2 * vectors(call_.batch() * area()) + vectors(masks() * area()) + (plain() ? 0 : vectors(masks() * size())) +
           (mixed() ? vectors(masks() * size()) : 0) + vectors(2 * rows()) + vectors(masks()) + vectors(2 * masks()) +
           call_.threads * line_floats();
  }

  // ratio = window / (s + eps) · u and valid = u for each output pixel.
  void make(float* space) {
    const auto take = [&](int64_t floats) {
      float* at = space;
      space += vectors(floats);
      return at;
    };
    ratio_ = take(call_.batch() * area()), valid_ = take(call_.batch() * area());
    sums_ = take(masks() * area()), channels_ = plain() ? nullptr : take(masks() * size());
    if (mixed()) first_ = reinterpret_cast<T*>(take(masks() * size()));
    ranges_ = take(2 * rows()), limits_ = take(masks()), thin_ = reinterpret_cast<int64_t*>(take(2 * masks()));
    if (!plain()) sum_channels();
    int next = 0;
    parallel_for(rows(), 16, call_.threads, [&](int64_t begin, int64_t end) {
      float* line = space + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * line_floats();
      for (int64_t i = begin; i < end; ++i) sum_windows(i / call_.height(), i % call_.height(), line);
    });
    for (int64_t mask = 0; mask < masks(); ++mask) limits_[mask] = limit_of(mask), thin_[mask] = count_thin(mask);
    parallel_for(call_.batch() * call_.height(), 16, call_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) renormalisation_of_row(i);
    });
  }

  void write(const irt_view& updated) const {
    parallel_for(call_.batch() * call_.height(), 64, call_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / call_.height(), y = i % call_.height(), step = updated.strides[3];
        T* to = static_cast<T*>(updated.data) + b * updated.strides[0] + y * updated.strides[2];
        const float* from = valid_ + i * call_.width();
        for (int64_t x = 0; x < call_.width(); x += conv::W) {
          const int64_t some = least(conv::W, call_.width() - x);
          write_some(to + x * step, Single::across(from + x, some, 1), some, step);
        }
      }
    });
  }

  // The mask, or one channel of it where all are alike.
  irt_view mask() const {
    irt_view m = *call_.mask;
    if (!alike_ || m.sizes[1] == 1) return m;
    if (mixed()) {
      m.data = first_;
      m.strides[0] = size(), m.strides[2] = m.sizes[3], m.strides[3] = 1;
    }
    m.sizes[1] = 1;
    return m;
  }

  const float* ratio(int64_t image) const { return ratio_ + image * area(); }
  const float* valid(int64_t image) const { return valid_ + image * area(); }

  // Windows of an image with few valid pixels, whose sums are multiplied, and the sums' rounding errors with them.
  int64_t thin(int64_t image) const { return thin_[mask_of(image)]; }
  // visit(x) for those in row y of the outputs
  template <class Visit>
  void each_thin(int64_t image, int64_t y, const Visit& visit) const {
    const int64_t mask = mask_of(image), row = mask * call_.height() + y;
    const float limit = limits_[mask];
    if (!(ranges_[2 * row] < limit)) return;
    const float* sums = sums_ + row * call_.width();
    for (int64_t x = 0; x < call_.width(); ++x) {
      if (sums[x] > 0.0f && sums[x] < limit) visit(x);
    }
  }

 private:
  static constexpr int64_t W = conv::W, kPixels = 1024;  // of one channel, summed at a time: as many as stay in L1
  static constexpr float kThin = 0.25f;  // of the fullest window; from there on Winograd's bound of error holds

  const conv::Call& call_;
  float window_, eps_;
  float *ratio_ = nullptr, *valid_ = nullptr, *sums_ = nullptr, *channels_ = nullptr, *ranges_ = nullptr,
        *limits_ = nullptr;
  int64_t* thin_ = nullptr;
  T* first_ = nullptr;  // channel of each mask
  int alike_ = 1;

  int64_t masks() const { return call_.mask->sizes[0]; }
  int64_t mask_of(int64_t image) const { return masks() == 1 ? 0 : image; }
  int64_t size() const { return call_.mask->sizes[2] * call_.mask->sizes[3]; }
  int64_t area() const { return call_.height() * call_.width(); }
  int64_t rows() const { return masks() * call_.height(); }
  int64_t positions() const { return call_.stride * (call_.width() - 1) + 1; }  // of windows along a row, stride 1
  int64_t reach() const { return call_.dilation * (call_.kernel_width() - 1); }
  int64_t line_floats() const { return vectors(ceil_div(positions(), W) * W + reach()); }
  // Whether the mask is a plane of floats whose rows are vectors.
  bool plain() const { return std::is_same_v<T, float> && call_.mask->sizes[1] == 1 && call_.mask->strides[3] == 1; }
  // Whether pixels lie apart because their channels lie side by side.
  bool mixed() const { return call_.mask->sizes[1] > 1 && call_.mask->strides[3] != 1; }
  const float* summed(int64_t mask, int64_t y) const {
    const irt_view& m = *call_.mask;
    if (channels_) return channels_ + mask * size() + y * m.sizes[3];
    return static_cast<const float*>(m.data) + mask * m.strides[0] + y * m.strides[2];
  }

  template <class To>
  static void write_some(To* to, Vec v, int64_t count, int64_t step) {
    count == W&& step == 1 ? store(to, v) : store_some(to, v, count, step);
  }

  // ---- channels → one plane

  void sum_channels() {
    const irt_view& m = *call_.mask;
    const bool flat = m.strides[2] == m.sizes[3] * m.strides[3];  // rows follow each other
    const int64_t lines = flat ? 1 : m.sizes[2], length = flat ? size() : m.sizes[3];
    const int64_t pieces = ceil_div(length, kPixels), grain = ceil_div(16, m.sizes[1]);
    parallel_for(masks() * lines * pieces, grain, call_.threads, [&](int64_t begin, int64_t end) {
      bool alike = true;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t mask = i / (lines * pieces), line = i / pieces % lines, first = i % pieces * kPixels;
        const T* from =
            static_cast<const T*>(m.data) + mask * m.strides[0] + line * m.strides[2] + first * m.strides[3];
        const int64_t at = mask * size() + line * length + first, count = least(kPixels, length - first);
        alike = sum_piece(from, count, channels_ + at) && alike;
        for (int64_t p = 0; mixed() && p < count; ++p) first_[at + p] = from[p * m.strides[3]];
      }
      if (!alike) __atomic_store_n(&alike_, 0, __ATOMIC_RELAXED);
    });
  }

  // The sums of some pixels' channels; whether each pixel's are all the same number.
  bool sum_piece(const T* from, int64_t count, float* to) const {
    const int64_t channels = call_.mask->sizes[1], channel = call_.mask->strides[1], pixel = call_.mask->strides[3];
    const int64_t whole = pixel == 1 || channel == 1 ? count / W * W : 0;
    Vec differences;
    if (pixel == 1) {
      sum_planes(*this, from, whole, to, differences);
    } else {
      for (int64_t i = 0; i < whole; i += W) store(to + i, sum_pixels(*this, from + i * pixel, differences));
    }
    float lanes[W];
    store(lanes, differences);
    bool alike = true;
    for (const float lane : lanes) alike = alike && lane == 0.0f;  // not if it is NaN
    for (int64_t i = whole; i < count; ++i) {
      const float first = to_float(from[i * pixel]);
      float sum = 0.0f;
      for (int64_t c = 0; c < channels; ++c) {
        const float value = to_float(from[i * pixel + c * channel]);
        sum += value, alike = alike && value == first;
      }
      to[i] = sum;
    }
    return alike;
  }

  // Of rows of pixels: four channels at a time, so that the sums are not loaded and stored for each.
  IRT_INLINE void sum_planes(const MaskPlanes& planes, const T* from, int64_t count, float* to, Vec& differences) {
    const int64_t channels = planes.call_.mask->sizes[1], step = planes.call_.mask->strides[1];
    memset(to, 0, static_cast<size_t>(count) * sizeof(float));
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
      const T* at = from + c * step;
      for (int64_t i = 0; i < count; i += W) {
        const Vec first = load(from + i),
                  v[] = {load(at + i), load(at + step + i), load(at + 2 * step + i), load(at + 3 * step + i)};
        store(to + i, load(to + i) + v[0] + v[1] + v[2] + v[3]);
        differences =
            differences + distance(v[0], first) + distance(v[1], first) + distance(v[2], first) + distance(v[3], first);
      }
    }
    for (; c < channels; ++c) {
      for (int64_t i = 0; i < count; i += W) {
        const Vec v = load(from + c * step + i);
        store(to + i, load(to + i) + v);
        differences = differences + distance(v, load(from + i));
      }
    }
  }

  // Of W pixels, whose channels lie side by side.
  IRT_INLINE Vec sum_pixels(const MaskPlanes& planes, const T* from, Vec& differences) {
    constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t channels = planes.call_.mask->sizes[1], step = planes.call_.mask->strides[3];
    const int64_t whole = channels / W * W, rest = channels - whole;
    const Vec present = load_some(kOnes, rest);
    Vec sums[W];
    for (int64_t i = 0; i < W; ++i) {
      const T* at = from + i * step;
      const Vec first(to_float(*at));
      for (int64_t c = 0; c < whole; c += W) {
        const Vec v = load(at + c);
        sums[i] = sums[i] + v, differences = differences + distance(v, first);
      }
      if (!rest) continue;
      const Vec v = load_some(at + whole, rest);
      sums[i] = sums[i] + v, differences = differences + distance(v, first * present);
    }
    transpose(sums);
    for (int64_t half = W / 2; half; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    }
    return sums[0];
  }

  static Vec distance(Vec a, Vec b) { return at_least(a - b, b - a); }

  // ---- one plane → windows

  void sum_windows(int64_t mask, int64_t y, float* line) const {
    const int64_t width = call_.mask->sizes[3], height = call_.mask->sizes[2], d = call_.dilation;
    memset(line, 0, static_cast<size_t>(line_floats()) * sizeof(float));
    const int64_t some = least(width, positions() + reach() - call_.left);  // columns that windows read
    for (int64_t i = 0; i < call_.kernel_height() && some > 0; ++i) {
      const int64_t row = y * call_.stride - call_.top + i * d;
      if (row < 0 || row >= height) continue;
      const float* from = summed(mask, row);
      float* to = line + call_.left;
      int64_t x = 0;
      for (; x + W <= some; x += W) store(to + x, load(to + x) + load(from + x));
      for (; x < some; ++x) to[x] += from[x];
    }
    for (int64_t x = 0; x < positions(); x += W) {  // in place: what is overwritten has been read
      Vec sum = load(line + x);
      for (int64_t j = 1; j < call_.kernel_width(); ++j) sum = sum + load(line + x + j * d);
      store(line + x, sum);
    }
    float* sums = sums_ + (mask * call_.height() + y) * call_.width();
    if (call_.stride == 1) {
      memcpy(sums, line, static_cast<size_t>(call_.width()) * sizeof(float));
    } else {
      for (int64_t x = 0; x < call_.width(); ++x) sums[x] = line[x * call_.stride];
    }
    range(sums, ranges_ + 2 * (mask * call_.height() + y));
  }

  // The least and largest positive sum of a row.
  void range(const float* sums, float* range) const {
    const Vec none(INFINITY), zero(0.0f);
    Vec low = none, high = zero;
    for (int64_t x = 0; x < call_.width(); x += W) {
      const Vec s = Single::across(sums + x, least(W, call_.width() - x), 1);
      low = at_most(low, if_positive(s, s, none)), high = at_least(high, if_positive(s, s, zero));
    }
    float lows[W], highs[W];
    store(lows, low), store(highs, high);
    range[0] = INFINITY, range[1] = 0.0f;
    for (int64_t i = 0; i < W; ++i) {
      range[0] = lows[i] < range[0] ? lows[i] : range[0], range[1] = highs[i] > range[1] ? highs[i] : range[1];
    }
  }

  float limit_of(int64_t mask) const {
    float high = 0.0f;
    const int64_t first = mask * call_.height();
    for (int64_t i = first; i < first + call_.height(); ++i)
      high = ranges_[2 * i + 1] > high ? ranges_[2 * i + 1] : high;
    return kThin * high;
  }

  void renormalisation_of_row(int64_t i) {
    const int64_t width = call_.width(), b = i / call_.height(), y = i % call_.height();
    const float* sums = sums_ + (mask_of(b) * call_.height() + y) * width;
    float *ratio = ratio_ + i * width, *valid = valid_ + i * width;
    const Vec zero(0.0f), one(1.0f), window(window_), eps(eps_);
    for (int64_t x = 0; x < width; x += W) {
      const int64_t some = least(W, width - x);
      const Vec s = Single::across(sums + x, some, 1), u = if_at_most_zero(s, zero, at_most(one, s));  // NaN stays
      write_some(valid + x, u, some, 1);
      write_some(ratio + x, window / if_at_most_zero(s, one, s + eps) * u, some, 1);
    }
  }

  int64_t count_thin(int64_t mask) const {
    int64_t count = 0;
    for (int64_t y = 0; y < call_.height(); ++y) each_thin(mask, y, [&](int64_t) { ++count; });
    return count;
  }
};

}  // namespace irt::INPAINTRT_ISA
