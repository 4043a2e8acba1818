// From the views of a step's call to what kernels are given (step.h): layouts, and the width of offsets.
#pragma once

#include "plan.h"
#include "step.h"
#include "step_call.h"

namespace irt::plan {

// One more than the largest offset that `view` reaches; 1 where there is none.
static inline int64_t reach(const irt_view* view) {
  int64_t last = 0;
  for (int d = 0; view && d < view->ndim; ++d) last += (view->sizes[d] - 1) * view->strides[d];
  return last + 1;
}

// `first`: the dimension of the view that is the batch; what is before it is the caller's to step through.
template <class Offset>
StepImage<Offset> step_image(const irt_view* view, const irt_view& like, int first = 0) {
  StepImage<Offset> image{};
  if (!view) return image;
  int64_t strides[4];
  broadcast_strides(*view, first, strides);
  const int64_t height = like.sizes[2], width = like.sizes[3];
  image.data = view->data;
  for (int d = 0; d < 4; ++d) image.strides[d] = static_cast<Offset>(strides[d]);
  image.dense = (width == 1 || strides[3] == 1) && (height == 1 || strides[2] == width);
  image.packed = image.dense && height * width % 4 == 0 && strides[0] % 4 == 0 && strides[1] % 4 == 0 &&
                 (first == 0 || view->strides[0] % 4 == 0) && aligned(view->data);
  return image;
}

template <class Offset>
StepShape<Offset> step_shape(const irt_view& like, int64_t count) {
  const int64_t plane = like.sizes[2] * like.sizes[3], elements = like.sizes[1] * plane;
  StepShape<Offset> shape{};
  shape.count = static_cast<Offset>(count);
  shape.elements = static_cast<Offset>(elements);
  shape.blocks = Divisor<Offset>::of(static_cast<Offset>((elements + 3) / 4));
  shape.plane = Divisor<Offset>::of(static_cast<Offset>(plane));
  shape.width = Divisor<Offset>::of(static_cast<Offset>(like.sizes[3]));
  return shape;
}

template <class Offset>
StepNoise<Offset> step_noise(const StepArguments& call, const irt_view& like) {
  StepNoise<Offset> noise{};
  noise.given = step_image<Offset>(call.noise, like, 1);
  noise.next = call.noise ? static_cast<Offset>(call.noise->strides[0]) : 0;
  noise.count = call.noise ? static_cast<int>(call.noise->sizes[0]) : 0;
  noise.seeds = call.seeds ? static_cast<const long long*>(call.seeds->data) : nullptr;
  noise.seed = call.seeds ? static_cast<Offset>(call.seeds->strides[0]) : 0;
  noise.call = call.call;
  noise.counter = call.counter ? call.counter->data : nullptr;
  noise.wide_counter = call.counter && call.counter->dtype == IRT_I64;
  return noise;
}

// The launch over all blocks of `like`, in which no view reaches beyond an int unless `wide` comes back true; null
// where there is nothing to do, or with a status where no grid is large enough.
template <size_t n>
irt_launch* add_step(irt_plan& plan, const irt_view& like, const irt_view* const (&views)[n], int64_t& count,
                     bool& wide, irt_status& status) {
  constexpr int kThreads = StepShape<int>::kThreads;
  const int64_t elements = like.sizes[1] * like.sizes[2] * like.sizes[3];
  count = like.sizes[0] * ((elements + 3) / 4);
  if (count == 0) return nullptr;
  wide = wide || elements + 4 > kNarrow || count + kThreads > kNarrow;
  for (const irt_view* view : views) wide = wide || reach(view) > kNarrow;
  return add_launch(plan, count, kThreads, status);
}

}  // namespace irt::plan
