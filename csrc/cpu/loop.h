// Elementwise iteration over tensors of any strides, as long contiguous rows where the layouts allow it.
#pragma once

#include <cstdint>

#include "inpaintrt/abi.h"

namespace irt::INPAINTRT_ISA {

// A nest over `kOperands` tensors of one shape. Dimensions are sorted so that the last one has the smallest stride of
// operand 0, and merged where every operand is contiguous across the border: a contiguous tensor becomes one row.
template <int kOperands>
struct Loop {
  int ndim = 0;
  int64_t sizes[IRT_MAX_DIMS];
  int64_t strides[kOperands][IRT_MAX_DIMS];

  Loop(int dims, const int64_t* shape, const int64_t* const (&operand_strides)[kOperands]) {
    for (int d = 0; d < dims; ++d) {
      if (shape[d] == 1) continue;
      int at = ndim++;  // insertion sort, by falling stride of operand 0
      for (; at > 0 && strides[0][at - 1] < operand_strides[0][d]; --at) move(at - 1, at);
      sizes[at] = shape[d];
      for (int k = 0; k < kOperands; ++k) strides[k][at] = operand_strides[k][d];
    }
    if (ndim == 0) {
      ndim = 1;
      sizes[0] = 1;
      for (int k = 0; k < kOperands; ++k) strides[k][0] = 1;
    }
    for (int d = ndim - 1; d > 0; --d) {
      bool joined = true;
      for (int k = 0; k < kOperands; ++k) joined = joined && strides[k][d - 1] == strides[k][d] * sizes[d];
      if (!joined) continue;
      sizes[d] *= sizes[d - 1];
      for (int at = d - 1; at + 1 < ndim; ++at) move(at + 1, at);
      --ndim;
    }
  }

  int64_t total() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= sizes[d];
    return n;
  }
  bool unit(int k) const { return strides[k][ndim - 1] == 1; }

  // Calls row(offsets, count) for the parts of rows that make up elements [begin, end) of the nest.
  template <class Row>
  void rows(int64_t begin, int64_t end, const Row& row) const {
    while (begin < end) {
      int64_t offsets[kOperands] = {};
      int64_t rest = begin, inner = 0;
      for (int d = ndim - 1; d >= 0; --d) {
        const int64_t index = rest % sizes[d];
        rest /= sizes[d];
        if (d == ndim - 1) inner = index;
        for (int k = 0; k < kOperands; ++k) offsets[k] += index * strides[k][d];
      }
      const int64_t left = sizes[ndim - 1] - inner, count = left < end - begin ? left : end - begin;
      row(offsets, count);
      begin += count;
    }
  }

 private:
  void move(int from, int to) {
    sizes[to] = sizes[from];
    for (int k = 0; k < kOperands; ++k) strides[k][to] = strides[k][from];
  }
};

}  // namespace irt::INPAINTRT_ISA
