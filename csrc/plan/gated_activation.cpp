// Launch plan of gated_activation: merge dimensions, pick the pack and the offset width.
#include "gated_activation.h"

#include "plan.h"

namespace irt::plan {
namespace {

template <class Offset>
void fill(irt_launch& launch, const irt_view& y, const irt_view& out, const Loop<2>& loop, int64_t count, int pack,
          float alpha, float gain, size_t element) {
  GatedActivation<Offset> p{};
  p.features = y.data;
  p.gates = static_cast<const char*>(y.data) + out.sizes[1] * y.strides[1] * static_cast<int64_t>(element);
  p.out = out.data;
  p.count = static_cast<Offset>(count);
  p.nest = nest<Offset>(loop, pack);
  p.alpha = alpha;
  p.gain = gain;
  set_params(launch, p);
}

// (y, activation, alpha, gain) -> out
void planned(const irt_call& call, irt_plan& plan, irt_status& status, bool always_wide) {
  const irt_view* y = tensor_arg(call, 0, status);
  if (!y) return;
  Act act;
  const bool formed = call.nargs == 4 && call.nouts == 1 && call.args[1].kind == IRT_STRING &&
                      is_number_or_none(call.args[2]) && is_number_or_none(call.args[3]);
  if (!formed || !parse_activation(call.args[1].s, act)) {
    return fail(status, IRT_BAD_ARGUMENT, "expected (y, activation, alpha, gain) and one output");
  }
  const irt_view& out = call.outs[0];
  bool fits = y->ndim == 4 && out.ndim == 4 && y->dtype == out.dtype && y->sizes[1] == 2 * out.sizes[1];
  fits = fits && y->sizes[0] == out.sizes[0] && y->sizes[2] == out.sizes[2] && y->sizes[3] == out.sizes[3];
  if (!fits) return fail(status, IRT_BAD_ARGUMENT, "y must be (B, 2C, H, W) and out (B, C, H, W) of the same dtype");
  const Storage type = storage(y->dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");

  const Loop<2> loop(4, out.sizes, {out.strides, y->strides});  // operands as in GatedActivation
  if (loop.total() == 0) return;                                // no launch: nothing to do
  const int64_t to_gates = out.sizes[1] * y->strides[1];
  const bool vector =
      packable(loop, type.per_vector) && to_gates % type.per_vector == 0 && aligned(y->data) && aligned(out.data);
  const int pack = vector ? type.per_vector : 1;
  const int64_t count = loop.total() / pack;

  constexpr int kThreads = GatedActivation<int>::kThreads;
  // A last block's idle threads count too, since they compute their index before they leave.
  const bool wide = always_wide || extent(loop, 0) > kNarrow || extent(loop, 1) > kNarrow || count + kThreads > kNarrow;
  irt_launch* const launch = add_launch(plan, count, kThreads, status);
  if (!launch) return;
  const float alpha = static_cast<float>(float_arg(call.args[2], default_alpha(act)));
  const float gain = static_cast<float>(float_arg(call.args[3], 1.0));
  const size_t element = 16 / static_cast<size_t>(type.per_vector);
  (wide ? fill<long long> : fill<int>)(*launch, *y, out, loop, count, pack, alpha, gain, element);
  snprintf(launch->entry, sizeof launch->entry, "irt::gated_activation<%s, %d, %s, irt::Act::%s>", type.name, pack,
           wide ? "long long" : "int", call.args[1].s);
}

void gated_activation(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, false); }

// The same with 64-bit offsets whatever the size: what tests compare with, where 2^31 elements do not fit.
void gated_activation_wide(const irt_call& call, irt_plan& plan, irt_status& status) {
  planned(call, plan, status, true);
}

}  // namespace

IRT_PLAN(gated_activation)
IRT_PLAN(gated_activation_wide)

}  // namespace irt::plan
