// Walks the samples of a batch in the order of their elements' indices (C, H, W), whatever the layout: noise goes by
// index.
#pragma once

#include <cstdint>

#include "inpaintrt/abi.h"

namespace irt::INPAINTRT_ISA {

// Over tensors that are broadcast to (B, C, H, W): rows of elements that lie at equal steps in every operand, as long
// as the layouts allow: a whole sample where all are contiguous. A broadcast dimension has stride 0.
template <int kOperands>
struct Samples {
  int64_t batch, elements;  // samples, and elements of one
  int ndim = 0;
  int64_t sizes[3], strides[kOperands][3], of_sample[kOperands];

  Samples(const int64_t* shape, const int64_t (&operand_strides)[kOperands][4])
      : batch(shape[0]), elements(shape[1] * shape[2] * shape[3]) {
    for (int k = 0; k < kOperands; ++k) of_sample[k] = operand_strides[k][0];
    for (int d = 1; d < 4; ++d) {
      if (shape[d] == 1) continue;
      bool joined = ndim > 0;
      for (int k = 0; k < kOperands && joined; ++k) {
        joined = strides[k][ndim - 1] == operand_strides[k][d] * shape[d];
      }
      if (!joined) sizes[ndim++] = 1;
      sizes[ndim - 1] *= shape[d];
      for (int k = 0; k < kOperands; ++k) strides[k][ndim - 1] = operand_strides[k][d];
    }
    if (ndim == 0) {
      ndim = 1;
      sizes[0] = 1;
      for (int k = 0; k < kOperands; ++k) strides[k][0] = 1;
    }
  }

  int64_t total() const { return batch * elements; }
  int64_t step(int k) const { return strides[k][ndim - 1]; }

  // Calls row(sample, index, offsets, count) for the parts of rows that make up elements [begin, end) of the batch;
  // none goes on beyond an index that `multiple` divides. `index` is that of the part's first element within its
  // sample.
  template <class Row>
  void rows(int64_t begin, int64_t end, int64_t multiple, const Row& row) const {
    while (begin < end) {
      const int64_t sample = begin / elements, index = begin % elements, last = sizes[ndim - 1];
      int64_t offsets[kOperands], rest = index;
      for (int k = 0; k < kOperands; ++k) offsets[k] = sample * of_sample[k];
      for (int d = ndim - 1; d >= 0; --d) {
        const int64_t at = rest % sizes[d];
        rest /= sizes[d];
        for (int k = 0; k < kOperands; ++k) offsets[k] += at * strides[k][d];
      }
      int64_t left = last - index % last;
      if (left > end - begin) left = end - begin;
      begin += left;
      for (int64_t i = index; left > 0;) {
        const int64_t whole = multiple - i % multiple, count = left < whole ? left : whole;
        row(sample, i, offsets, count);
        for (int k = 0; k < kOperands; ++k) offsets[k] += count * step(k);
        i += count;
        left -= count;
      }
    }
  }
};

// The strides of a view broadcast to four dimensions; 0 where it has one element.
static inline void broadcast_strides(const irt_view& view, int first, int64_t (&strides)[4]) {
  for (int d = 0; d < 4; ++d) strides[d] = view.sizes[first + d] == 1 ? 0 : view.strides[first + d];
}

// Whether a view is (1|B, 1|C, H, W) of `like`, or with `exact` all of it, and float where its dtype is to be `dtype`.
static inline bool fits_image(const irt_view& view, const irt_view& like, int32_t dtype, bool batch, bool channels) {
  if (view.ndim != 4 || view.dtype != dtype || view.sizes[2] != like.sizes[2] || view.sizes[3] != like.sizes[3]) {
    return false;
  }
  return (view.sizes[0] == like.sizes[0] || (batch && view.sizes[0] == 1)) &&
         (view.sizes[1] == like.sizes[1] || (channels && view.sizes[1] == 1));
}

}  // namespace irt::INPAINTRT_ISA
