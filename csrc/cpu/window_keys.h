// What a window of window_attention is: where its tokens lie, what its mask adds, and which keys count for which
// queries.
#pragma once

#include <cmath>

#include "inpaintrt/abi.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA {

struct WindowCall {
  const irt_view *q, *k, *v, *mask, *bias, *out;  // mask and bias may be null
  int64_t size, heads, shift;
  float scale, mask_value;
  int threads;

  int64_t tokens() const { return size * size; }
  int64_t down() const { return out->sizes[1] / size; }
  int64_t across() const { return out->sizes[2] / size; }
};

// An element as a float. For masks and biases, which are few.
static inline float element(const irt_view& x, int64_t at) {
  if (x.dtype == IRT_F32) return static_cast<const float*>(x.data)[at];
  if (x.dtype == IRT_BF16) return to_float(static_cast<const bf16*>(x.data)[at]);
  return to_float(static_cast<const f16*>(x.data)[at]);
}

// The tokens of one region of a window as queries, and the keys that count for them.
struct Region {
  int64_t top, left, height, width;  // in the window
  int64_t keys;                      // in the list
  bool level;                        // their addends are equal, so they cancel
  double gap;                        // from the best addend to that of any other key; infinite if there is none
  int32_t* list;
  float* addends;  // of the keys in the list, relative to the best

  int64_t tokens() const { return height * width; }
};

class Window {
 public:
  enum Way { kPlain, kSparse, kExact };  // see window_attention.cpp
  enum { kQ, kK, kV, kOut, kTensors };
  static constexpr int kMostRegions = 4;

  int regions = 0;
  Way way = kPlain;
  bool masked = false;         // the mask adds something that does not cancel
  bool vacant = false;         // no token is valid, and nothing but the mask and seams is added
  int64_t* offsets[kTensors];  // of the tokens
  float* added;                // by the mask, per token
  int32_t *all, *region_of;    // 0, 1, 2 …; the region of a token
  Region region[kMostRegions];

  static int64_t floats(const WindowCall& call) {
    const int64_t n = call.tokens();
    return vectors(n * 2 * kTensors) + vectors(n * (1 + kMostRegions)) + vectors(n * (2 + kMostRegions));
  }

  Window(const WindowCall& call, float* space) : call_(call), n_(call.tokens()) {
    auto* integers = reinterpret_cast<int64_t*>(space);
    for (int i = 0; i < kTensors; ++i) offsets[i] = integers + i * n_;
    added = space + vectors(n_ * 2 * kTensors);
    all = reinterpret_cast<int32_t*>(added + vectors(n_ * (1 + kMostRegions)));
    region_of = all + n_;
    for (int i = 0; i < kMostRegions; ++i)
      region[i].addends = added + (1 + i) * n_, region[i].list = all + (2 + i) * n_;
    for (int64_t t = 0; t < n_; ++t) all[t] = static_cast<int32_t>(t);
  }

  // Windows are counted row by row, image by image.
  void enter(int64_t index) {
    const int64_t image = index / (call_.down() * call_.across());
    const int64_t row = index / call_.across() % call_.down(), column = index % call_.across();
    bool finite = true, uniform = true;
    for (int64_t y = 0, t = 0; y < call_.size; ++y) {
      for (int64_t x = 0; x < call_.size; ++x, ++t) {
        place(t, image, (row * call_.size + y + call_.shift) % call_.out->sizes[1],
              (column * call_.size + x + call_.shift) % call_.out->sizes[2]);
        if (call_.mask) finite &= std::isfinite(added[t]), uniform &= added[t] == added[0];
      }
    }
    masked = call_.mask && !(finite && uniform);
    vacant = call_.mask && finite && uniform && added[0] == call_.mask_value && !call_.bias;
    split(row == call_.down() - 1, column == call_.across() - 1);
    way = call_.bias || !finite ? kExact : regions > 1 || masked ? kSparse : kPlain;
    if (way == kSparse) choose_keys();
  }

 private:
  const WindowCall& call_;
  int64_t n_;

  void place(int64_t t, int64_t image, int64_t y, int64_t x) {
    const irt_view* views[] = {call_.q, call_.k, call_.v, call_.out};
    for (int i = 0; i < kTensors; ++i) {
      const int64_t* strides = views[i]->strides;
      offsets[i][t] = image * strides[0] + y * strides[1] + x * strides[2];
    }
    if (!call_.mask) return;
    const int64_t* strides = call_.mask->strides;
    const float m =
        element(*call_.mask, (call_.mask->sizes[0] == 1 ? 0 : image) * strides[0] + y * strides[1] + x * strides[2]);
    added[t] = m == 1.0f ? 0.0f : m == 0.0f ? call_.mask_value : m;
  }

  // A shift cuts the windows of the last row and column into what came from the end of the map and from its beginning.
  void split(bool last_row, bool last_column) {
    const int64_t size = call_.size, cut = size - call_.shift;
    const int64_t ys[] = {0, last_row && call_.shift ? cut : size, size};
    const int64_t xs[] = {0, last_column && call_.shift ? cut : size, size};
    regions = 0;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        Region& r = region[regions];
        r.top = ys[i], r.left = xs[j], r.height = ys[i + 1] - ys[i], r.width = xs[j + 1] - xs[j];
        if (r.tokens() == 0) continue;
        for (int64_t t = 0; t < r.tokens(); ++t) {
          region_of[(r.top + t / r.width) * size + r.left + t % r.width] = regions;
        }
        ++regions;
      }
    }
  }

  // Keys within half a mask_value of the best are in the list.
  void choose_keys() {
    const double value = call_.mask_value;
    for (int i = 0; i < regions; ++i) {
      Region& r = region[i];
      const auto addend = [&](int64_t j) {
        return (region_of[j] == i ? 0.0 : value) + (masked ? static_cast<double>(added[j]) : 0.0);
      };
      double best = addend(0);
      for (int64_t j = 1; j < n_; ++j) best = addend(j) > best ? addend(j) : best;
      r.keys = 0, r.level = true, r.gap = INFINITY;
      for (int64_t j = 0; j < n_; ++j) {
        const double less = best - addend(j);
        if (less > std::fabs(value) / 2.0) {
          r.gap = less < r.gap ? less : r.gap;
          continue;
        }
        r.level &= less == 0.0;
        r.addends[r.keys] = static_cast<float>(-less);
        r.list[r.keys++] = static_cast<int32_t>(j);
      }
    }
  }
};

}  // namespace irt::INPAINTRT_ISA
