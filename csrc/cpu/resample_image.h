// A whole image through a FIR filter, and what a convolution's outputs get at their end: upfirdn2d, and the second half
// of a doubling modulated convolution.
#pragma once

#include "arena.h"
#include "conv_finish.h"
#include "kernel.h"
#include "parallel.h"
#include "resample.h"

namespace irt::INPAINTRT_ISA::conv {

// call.out = finish(every step-th pixel of x through the filter); of the call only what the outputs get is read.
template <class T>
static inline void resample_image(const irt_view& x, const Resampling& filter, int64_t step_x, int64_t step_y,
                                  const Call& call, irt_status& status) {
  const int64_t height = call.height(), width = call.width(), units = ceil_div(call.outputs(), W);
  const int threads = threads_of(call, call.batch() * height);
  const int64_t floats = vectors(width * W);
  const Workspace space(static_cast<size_t>(threads * floats) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  const Finish<T> finish(call);
  const Resampled<Single> rows(filter, x.sizes[2], x.sizes[3]);
  int next = 0;
  parallel_for(call.batch() * height, 1, threads, [&](int64_t begin, int64_t end) {
    float* sums = static_cast<float*>(space.data()) + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * floats;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      for (int64_t unit = 0; unit < units; ++unit) {
        const auto read = [&](int64_t row, int64_t first, int64_t count, float* line) {
          read_row<Single>(row_of<const T, Single>(x, b, unit, row, first), count, line);
        };
        rows.row(y * step_y, 0, width, step_x, sums, read, [](Vec sum, Vec) { return sum; });
        finish(b, unit, y, 0, width, sums, nullptr);
      }
    }
  });
}

}  // namespace irt::INPAINTRT_ISA::conv
