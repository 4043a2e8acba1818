// How an image becomes another through a FIR filter: what the plans of upfirdn2d and modulated_conv2d share.
#pragma once

#include <cmath>

#include "conv2d_call.h"
#include "resample.h"

namespace irt::plan {

// By axis, rows first.
struct Steps {
  int64_t up[2], down[2], before[2];  // zeros before the enlarged axis; negative: a crop
};

// `filter` is float32 (rows, columns), or null for 1. Convolves, or correlates. False with a status where the numbers
// are too large.
inline bool resampled(const irt_view& image, const irt_view& out, const irt_view* filter, bool correlates,
                      const Steps& steps, Resample& p, irt_status& status) {
  p.image = conv2d::tensor(&image), p.out = out.data;
  for (int d = 0; d < 4; ++d) p.out_strides[d] = out.strides[d];
  p.filter = filter ? static_cast<const float*>(filter->data) : nullptr;
  const int64_t total = out.sizes[0] * out.sizes[1] * out.sizes[2] * out.sizes[3];
  bool small = total < kNarrow - Resample::kThreads;
  for (int d = 0; d < 2; ++d) {
    Resample::Axis& axis = d ? p.columns : p.rows;
    const int64_t size = image.sizes[2 + d], up = steps.up[d], before = steps.before[d];
    const int64_t lifted = before > 0 ? ceil_div(before, up) : 0, offset = lifted * up - before;
    for (const int64_t n : {size, up, steps.down[d], before, -before}) small = small && n <= conv2d::kMostSize;
    const int64_t last = (out.sizes[2 + d] - 1) * steps.down[d] + offset;
    if (!small || last > kNarrow - conv2d::kMostSize || size * up > kNarrow) {
      return fail(status, IRT_UNSUPPORTED, conv2d::kTooLarge), false;
    }
    axis.up = Divisor<int>::of(conv2d::narrow(up));
    axis.step = conv2d::narrow(steps.down[d]);
    axis.offset = conv2d::narrow(offset), axis.lifted = conv2d::narrow(lifted);
    axis.taps = filter ? conv2d::narrow(filter->sizes[d]) : 1;
    axis.size = conv2d::narrow(size);
    if (!filter) continue;
    p.filter_strides[d] = filter->strides[d];
    if (correlates) continue;  // else the last tap meets the first sample
    p.filter += (filter->sizes[d] - 1) * filter->strides[d];
    p.filter_strides[d] = -filter->strides[d];
  }
  return true;
}

// Adds the launch of `kernel`<type, pack>.
inline bool add_resample(const char* kernel, const irt_view& image, const irt_view& out, Resample& p, irt_plan& plan,
                         irt_status& status) {
  const Storage type = storage(out.dtype);
  p.inner = conv2d::channels_inner(out);
  bool vectors = p.inner && image.strides[1] == 1 && out.sizes[1] % type.per_vector == 0;
  for (const irt_view* view : {&image, &out}) {
    vectors = vectors && aligned(view->data);
    for (const int d : {0, 2, 3}) vectors = vectors && (view->sizes[d] == 1 || view->strides[d] % type.per_vector == 0);
  }
  const int pack = vectors ? type.per_vector : 1;
  const int64_t packs = out.sizes[1] / pack;
  const int64_t inner[] = {packs, out.sizes[3], out.sizes[2]}, outer[] = {out.sizes[3], out.sizes[2], packs};
  for (int i = 0; i < 3; ++i) p.sizes[i] = Divisor<int>::of(conv2d::narrow((p.inner ? inner : outer)[i]));
  p.count = conv2d::narrow(out.sizes[0] * packs * out.sizes[2] * out.sizes[3]);
  irt_launch* const launch = add_launch(plan, p.count, Resample::kThreads, status);
  if (!launch) return false;
  snprintf(launch->entry, sizeof launch->entry, "irt::%s<%s, %d>", kernel, type.name, pack);
  set_params(*launch, p);
  return true;
}

}  // namespace irt::plan
