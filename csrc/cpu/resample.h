// Images read through a FIR filter, one row at a time: zeros inserted, padded, filtered. The zeros are left out, and of
// a filter that is an outer product rows and columns are summed in turn.
#pragma once

#include <cmath>

#include "rows.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA {

constexpr int64_t kLongestFilter = 16, kLargestFactor = 8;

struct Resampling {
  int64_t up_x, up_y;     // each sample is followed by up − 1 zeros
  int64_t left, top;      // zeros before the enlarged image; negative: a crop
  int64_t rows, columns;  // of taps
  bool outer;             // tap (i, j) is down[i] · across[0][j]
  float down[kLongestFilter];
  float across[kLongestFilter][kLongestFilter];

  // Taps of f, float32 (rows, columns), as they are multiplied: mirrored where the filter convolves.
  void set(const irt_view& f, float gain, bool correlates) {
    rows = f.sizes[0], columns = f.sizes[1], outer = false;
    const float* data = static_cast<const float*>(f.data);
    float largest = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t y = correlates ? i : rows - 1 - i, x = correlates ? j : columns - 1 - j;
        across[i][j] = gain * data[y * f.strides[0] + x * f.strides[1]];
        if (!(std::fabs(across[i][j]) <= largest)) largest = std::fabs(across[i][j]);
      }
    }
    if (!(largest > 0.0f && largest < INFINITY)) return;
    // What rows have in common is told by a small tap: in the filters in use the others are multiples of it, so that
    // the quotients are exact.
    int64_t p = -1, q = -1;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const float size = std::fabs(across[i][j]);
        if (size >= 0x1p-10f * largest && (p < 0 || size < std::fabs(across[p][q]))) p = i, q = j;
      }
    }
    for (int64_t i = 0; i < rows; ++i) down[i] = across[i][q] / across[p][q];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const float error = across[i][j] - down[i] * across[p][j];
        if (!(std::fabs(error) <= 0x1p-22f * largest)) return;
      }
    }
    for (int64_t j = 0; j < columns; ++j) across[0][j] = across[p][j];
    outer = true;
  }
};

// A row of an image of height × width pixels. read(row, first, count, line) yields pixels of it as [pixel][lane].
template <class Lane>
class Resampled {
 public:
  static constexpr int64_t W = Vec::kWidth;

  Resampled(const Resampling& r, int64_t height, int64_t width) : r_(r), height_(height), width_(width) {}

  // Pixels first, first + step … of row y of the filtered image; finish(sums of even channels, of odd ones) is stored.
  template <class Read, class Finish>
  void row(int64_t y, int64_t first, int64_t count, int64_t step, float* to, const Read& read,
           const Finish& finish) const {
    const int64_t chunk = kSpan / step;
    for (int64_t i = 0; i < count; i += chunk) {
      piece(y, (first + i * step), least(chunk, count - i), step, to + i * W, read, finish);
    }
  }

 private:
  static constexpr int64_t kSpan = 96, kWindow = kSpan + kLongestFilter + 2;  // pixels

  const Resampling& r_;
  int64_t height_, width_;

  // The first of the enlarged image's positions, from `at` on, that holds a sample; as the sample's index.
  static int64_t sample_from(int64_t at, int64_t up) { return up == 1 ? at : -floor_div(-at, up); }

  template <class Read, class Finish>
  void piece(int64_t y, int64_t first, int64_t count, int64_t step, float* to, const Read& read,
             const Finish& finish) const {
    constexpr int kParts = Lane::kChannels;
    alignas(64) float window[kParts][kWindow * W], line[kWindow * W], sums_so_far[kParts][kSpan * W];
    const int64_t base = first - r_.left;
    const int64_t low = sample_from(base, r_.up_x);
    const int64_t high = floor_div(base + (count - 1) * step + r_.columns - 1, r_.up_x) + 1;
    const int64_t begin = least(most(low, 0), most(high, low)), end = most(begin, least(high, width_));
    const bool none = begin >= width_ || end <= begin;
    for (int64_t pass = 0; pass < (r_.outer ? 1 : r_.rows); ++pass) {
      for (int part = 0; part < kParts; ++part) {
        for (int64_t i = 0; i < high - low; ++i) store(window[part] + i * W, Vec(0.0f));
      }
      for (int64_t i = r_.outer ? 0 : pass; i < (r_.outer ? r_.rows : pass + 1); ++i) {
        const int64_t at = y + i - r_.top, row = floor_div(at, r_.up_y);
        if (none || row * r_.up_y != at || row < 0 || row >= height_) continue;
        read(row, begin, end - begin, line);
        const Vec factor(r_.outer ? r_.down[i] : 1.0f);
        for (int64_t k = 0; k < end - begin; ++k) {
          const Vec pixel = load(line + k * W);
          float* sums = window[0] + (begin - low + k) * W;
          store(sums, fma(Lane::even(pixel), factor, load(sums)));
          if constexpr (kParts == 2) {
            store(sums + kWindow * W, fma(Lane::odd(pixel), factor, load(sums + kWindow * W)));
          }
        }
      }
      const bool last = r_.outer || pass == r_.rows - 1;
      if (r_.outer && r_.columns == 4 && r_.up_x == 1) {
        across<4, 1>(pass, base, low, count, step, window, sums_so_far, to, last, finish);
      } else if (r_.outer && r_.columns == 4 && r_.up_x == 2) {
        across<4, 2>(pass, base, low, count, step, window, sums_so_far, to, last, finish);
      } else {
        across<0, 0>(pass, base, low, count, step, window, sums_so_far, to, last, finish);
      }
    }
  }

  // Sums over columns, beginning from those of the passes before.
  template <int kColumns, int kUp, class Finish>
  void across(int64_t pass, int64_t base, int64_t low, int64_t count, int64_t step,
              const float (&window)[Lane::kChannels][kWindow * W], float (&before)[Lane::kChannels][kSpan * W],
              float* to, bool last, const Finish& finish) const {
    const int64_t columns = kColumns ? kColumns : r_.columns, up = kUp ? kUp : r_.up_x;
    constexpr int kSecond = Lane::kChannels - 1;
    const float* taps = r_.across[pass];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = base + i * step, from = sample_from(at, up);
      const float* pixel = window[0] + (from - low) * W;
      Vec even = pass ? load(before[0] + i * W) : Vec(0.0f), odd = pass ? load(before[kSecond] + i * W) : Vec(0.0f);
      for (int64_t j = from * up - at; j < columns; j += up, pixel += W) {
        const Vec tap(taps[j]);
        even = fma(load(pixel), tap, even);
        if constexpr (Lane::kChannels == 2) odd = fma(load(pixel + kWindow * W), tap, odd);
      }
      if (last) {
        store(to + i * W, finish(even, odd));
      } else {
        if (kSecond) store(before[kSecond] + i * W, odd);
        store(before[0] + i * W, even);
      }
    }
  }
};

}  // namespace irt::INPAINTRT_ISA
