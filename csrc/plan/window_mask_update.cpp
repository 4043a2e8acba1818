// Launch plan of window_mask_update: a warp per window.
#include "window_mask_update.h"

#include "windows_call.h"

namespace irt::plan {
namespace {

using Params = WindowMaskUpdate;

Params::Mask mask_of(const irt_view& view) { return {view.data, {view.strides[0], view.strides[1], view.strides[2]}}; }

// (mask, window_size, shift) -> out
void window_mask_update(const irt_call& call, irt_plan& plan, irt_status& status) {
  bool good = call.nargs == 3 && call.nouts == 1 && call.args[0].kind == IRT_TENSOR;
  if (good) {
    const irt_view &mask = *call.args[0].tensors, &out = call.outs[0];
    good = mask.dtype == out.dtype && out.ndim == 4 && divide(mask, call.args[1], call.args[2]) && mask.sizes[3] == 1 &&
           !memcmp(mask.sizes, out.sizes, 4 * sizeof out.sizes[0]);
  }
  if (!good) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (mask, window_size, shift) and one output, both (B, H, W, 1) of one dtype, which the window "
                "divides");
  }
  const irt_view &mask = *call.args[0].tensors, &out = call.outs[0];
  const Storage type = storage(out.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  Params p{};
  const int64_t count = windows(mask, call.args[1], call.args[2], p.windows, status);
  if (count <= 0) return;  // refused, or nothing to do
  p.mask = mask_of(mask);
  p.out = mask_of(out);
  p.count = static_cast<int>(count);
  irt_launch* const launch = add_launch(plan, count * 32, Params::kThreads, status);
  if (!launch) return;
  snprintf(launch->entry, sizeof launch->entry, "irt::window_mask_update<%s>", type.name);
  set_params(*launch, p);
}

}  // namespace

IRT_PLAN(window_mask_update)

}  // namespace irt::plan
