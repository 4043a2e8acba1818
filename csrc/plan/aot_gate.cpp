// Launch plan of aot_gate: how pixels are cut into tiles; for the blend, merge dimensions, pick pack and offset width.
#include "aot_gate.h"

#include "moments_plan.h"

namespace irt::plan {
namespace {

constexpr int kLine = AotBlend<int>::kLine;

template <class Offset>
void fill(irt_launch& launch, const irt_call& call, const Loop<5>& loop, int64_t count, int pack) {
  AotBlend<Offset> p{};
  p.x = call.args[0].tensors->data;
  p.fuse = call.args[1].tensors->data;
  p.gate = call.args[2].tensors->data;
  p.out = call.outs[0].data;
  p.count = static_cast<Offset>(count);
  p.nest = nest<Offset>(loop, pack);
  set_params(launch, p);
}

bool fits(const irt_view& a, const irt_view& b) {
  return a.ndim == 4 && b.ndim == 4 && a.dtype == b.dtype && !memcmp(a.sizes, b.sizes, 4 * sizeof a.sizes[0]);
}

// (x, fuse, gate, eps) -> out
void planned(const irt_call& call, irt_plan& plan, irt_status& status, bool always_wide) {
  bool good = call.nargs == 4 && call.nouts == 1 && is_number_or_none(call.args[3]);
  for (int i = 0; i < 3 && good; ++i) {
    good = call.args[i].kind == IRT_TENSOR && fits(*call.args[i].tensors, call.outs[0]);
  }
  if (!good) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (x, fuse, gate, eps) and one output, all tensors (B, C, H, W) of one dtype");
  }
  const irt_view &x = *call.args[0].tensors, &fuse = *call.args[1].tensors, &gate = *call.args[2].tensors;
  const irt_view& out = call.outs[0];
  const Storage type = storage(out.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const int64_t batch = out.sizes[0], channels = out.sizes[1], pixels = out.sizes[2] * out.sizes[3];
  if (batch * channels * pixels == 0) return;  // no launches: nothing to do

  AotGate p{};
  p.eps = float_arg(call.args[3], 1e-9);
  const int side = side_by_side(gate);
  const int64_t planes = batch * channels;
  if (!measure(plan, gate, type.name, side, 0, channels, planes, p.moments, status)) return;
  static_assert(sizeof(PlaneMoments::Part) == sizeof(PlaneMoments::Line));
  plan.workspace_bytes = planes * (p.moments.tiles + 1) * static_cast<int64_t>(sizeof(PlaneMoments::Part));
  irt_launch* launch = add_launch(plan, planes * AotGate::kLineThreads, AotGate::kLineThreads, status);
  if (!launch) return;
  launch->shared_bytes = sizeof(AotGate::LineMemory);
  snprintf(launch->entry, sizeof launch->entry, "irt::aot_gate_lines<%d>", side);
  set_params(*launch, p);

  const int64_t of_lines[] = {channels, 1, 0, 0};
  const Loop<5> loop(4, out.sizes, {out.strides, x.strides, fuse.strides, gate.strides, of_lines});  // as in AotBlend
  const bool vector = packs_with_lines(loop, type.per_vector) && aligned(x.data) && aligned(fuse.data) &&
                      aligned(gate.data) && aligned(out.data);
  const int pack = vector ? type.per_vector : 1;
  const bool own_lines = vector && loop.strides[kLine][loop.ndim - 1] == 1;
  const int64_t count = loop.total() / pack;
  constexpr int kThreads = AotBlend<int>::kThreads;
  // A last block's idle threads count too, since they compute their index before they leave.
  bool wide = always_wide || count + kThreads > kNarrow;
  for (int k = 0; k < 5; ++k) wide = wide || extent(loop, k) > kNarrow;
  launch = add_launch(plan, count, kThreads, status);
  if (!launch) return;
  (wide ? fill<long long> : fill<int>)(*launch, call, loop, count, pack);
  snprintf(launch->entry, sizeof launch->entry, "irt::aot_gate_blend<%s, %d, %s, %s>", type.name, pack,
           own_lines ? "true" : "false", wide ? "long long" : "int");
}

void aot_gate(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, false); }

// The same with 64-bit offsets whatever the size: what tests compare with, where 2^31 elements do not fit.
void aot_gate_wide(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, true); }

}  // namespace

IRT_PLAN(aot_gate)
IRT_PLAN(aot_gate_wide)

}  // namespace irt::plan
