// The arguments of upfirdn2d, and why some are not.
#pragma once

#include "kernel.h"

namespace irt::INPAINTRT_ISA {

// (x, f, up[2], down[2], padding[4], flip_filter, gain) -> out
struct UpfirdnCall {
  const irt_view *x, *filter, *out;
  const int64_t *up, *down, *padding;  // (x, y), (x, y), (left, right, top, bottom)
  bool correlates;
  float gain;

  // Null, or what is wrong.
  const char* read(const irt_call& call) {
    enum { kX, kFilter, kUp, kDown, kPadding, kFlip, kGain, kArguments };
    const irt_value* a = call.args;
    if (call.nargs != kArguments || call.nouts != 1) return "expected the 7 arguments of upfirdn2d and one output";
    if (a[kX].kind != IRT_TENSOR || a[kFilter].kind != IRT_TENSOR) return "x and f must be tensors";
    x = a[kX].tensors, filter = a[kFilter].tensors, out = &call.outs[0];
    if (x->ndim != 4 || out->ndim != 4 || x->dtype != out->dtype) return "x and the output must be 4-D, of one dtype";
    if (filter->ndim != 2 || filter->dtype != IRT_F32 || filter->sizes[0] < 1 || filter->sizes[1] < 1) {
      return "f must be float32 (rows, columns)";
    }
    const auto pair = [](const irt_value& v) { return v.kind == IRT_INTS && v.count == 2; };
    if (!pair(a[kUp]) || !pair(a[kDown]) || a[kPadding].kind != IRT_INTS || a[kPadding].count != 4) {
      return "up and down must be pairs, padding (left, right, top, bottom)";
    }
    if (a[kFlip].kind != IRT_INT || !is_number_or_none(a[kGain])) return "flip_filter must be a bool, gain a number";
    up = a[kUp].ints, down = a[kDown].ints, padding = a[kPadding].ints;
    correlates = a[kFlip].i != 0, gain = static_cast<float>(float_arg(a[kGain], 1.0));
    if (x->sizes[0] != out->sizes[0] || x->sizes[1] != out->sizes[1])
      return "batch and channels of x and output differ";
    for (int d = 0; d < 2; ++d) {  // rows, columns
      constexpr int64_t kMost = int64_t{1} << 31;
      const auto within = [](int64_t n, int64_t low) { return n >= low && n <= kMost; };
      const int64_t before = padding[2 - 2 * d], after = padding[3 - 2 * d], size = x->sizes[2 + d];
      if (!within(up[1 - d], 1) || !within(down[1 - d], 1)) return "up and down must be 1 or more, and not that much";
      if (!within(before, -kMost) || !within(after, -kMost) || !within(size, 1)) {
        return "x is empty or its size or padding too large";
      }
      const int64_t reach = size * up[1 - d] + before + after - filter->sizes[d];
      if (reach < 0 || out->sizes[2 + d] != reach / down[1 - d] + 1) return "the output's size does not fit";
    }
    return nullptr;
  }
};

}  // namespace irt::INPAINTRT_ISA
