// A call of fused_conv2d, and what its algorithms share: how a finished row leaves.
#pragma once

#include "activation.h"
#include "inpaintrt/abi.h"
#include "rows.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA::conv {

constexpr int64_t W = Vec::kWidth;

enum class Padding { zeros, reflect, replicate };

struct Call {
  const irt_view *x, *weight, *bias, *residual, *out;
  int64_t top, left, bottom, right;
  Padding padding;
  Act act;
  float alpha;
  bool residual_first;  // act(… + residual) instead of act(…) + residual
  int threads;
};

// Each thread has scratch memory of its own: no more of them than there are items of work.
static inline int threads_of(const Call& call, int64_t items) {
  return static_cast<int>(most(1, least(call.threads, least(items, 1024))));
}

// Whether the sizes of the workspace can be computed without overflow. What cannot would take terabytes.
static inline bool fits(const Call& call) {
  constexpr int64_t kLongest = int64_t{1} << 28;
  double floats = 1, weights = 1;
  for (int d = 0; d < 4; ++d) {
    const int64_t longest = most(call.x->sizes[d], call.out->sizes[d]);
    if (longest > kLongest) return false;
    floats *= static_cast<double>(d ? longest : 1);
    weights *= static_cast<double>(d < 2 ? call.weight->sizes[d] : 1);
  }
  return floats <= 0x1p38 && weights <= 0x1p38;
}

// The bias of one block of outputs; zeros if there is none.
template <class T = float>
static inline Vec bias_of(const Call& call, int64_t block) {
  if (!call.bias) return Vec(0.0f);
  const int64_t step = call.bias->strides[0];
  return load_some(static_cast<const T*>(call.bias->data) + block * W * step, least(W, call.out->sizes[1] - block * W),
                   step);
}

// `count` pixels of row y of a block of outputs, their sums given as [pixel][lane]: activation, residual, and back to
// the tensor's layout.
template <class T = float>
static inline void finish_row(const Call& call, const float* row, int64_t b, int64_t block, int64_t y, int64_t first,
                              int64_t count) {
  const Row<T> to = row_of<T>(*call.out, b, block, y, first);
  const Row<T> extra = call.residual ? row_of<T>(*call.residual, b, block, y, first) : Row<T>{};
  const Vec alpha(call.alpha);
  with_activation(call.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if (call.residual_first) {
      write_row(row, count, extra, to, [&](Vec v, Vec more) { return activate<kAct>(v + more, alpha); });
    } else {
      write_row(row, count, extra, to, [&](Vec v, Vec more) { return activate<kAct>(v, alpha) + more; });
    }
  });
}

}  // namespace irt::INPAINTRT_ISA::conv
