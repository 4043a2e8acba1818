// Launch plan of group_norm_silu: each of the tensors that x is joined from has a first and a last launch of its own;
// only the one between them, which sees no pixels, knows of groups.
#include "group_norm_silu.h"

#include "moments_plan.h"
// After plan.h, which says whose namespace it is in.
#include "group_norm_call.h"

namespace irt::plan {
namespace {

constexpr int kLine = GroupNormApply<int>::kLine;

GroupNormLines::Vector vector_of(const irt_view* view) {
  GroupNormLines::Vector vector{};
  if (!view) return vector;
  vector.data = view->data;
  vector.strides[0] = view->ndim == 2 ? view->strides[0] : 0;
  vector.strides[1] = view->strides[view->ndim - 1];
  vector.single = view->dtype == IRT_F32;
  return vector;
}

template <class Offset>
void fill(irt_launch& launch, const irt_view& x, void* out, const Loop<3>& loop, int64_t first, int64_t count, int pack,
          bool silu) {
  GroupNormApply<Offset> p{};
  p.x = x.data;
  p.out = out;
  p.count = static_cast<Offset>(count);
  p.nest = nest<Offset>(loop, pack);
  p.first = first;
  p.silu = silu;
  set_params(launch, p);
}

// The last launch for the part of x whose channels begin at `first`.
bool apply(irt_plan& plan, const GroupNormCall& call, const irt_view& x, int64_t first, const Storage& type,
           bool always_wide, irt_status& status) {
  const irt_view& out = *call.out;
  void* const to = static_cast<char*>(out.data) + first * out.strides[1] * static_cast<int64_t>(16 / type.per_vector);
  const int64_t of_lines[] = {out.sizes[1], 1, 0, 0};
  const Loop<3> loop(4, x.sizes, {out.strides, x.strides, of_lines});  // as in GroupNormApply
  const bool vector = packs_with_lines(loop, type.per_vector) && aligned(x.data) && aligned(to);
  const int pack = vector ? type.per_vector : 1;
  const bool own_lines = vector && loop.strides[kLine][loop.ndim - 1] == 1;
  const int64_t count = loop.total() / pack;
  constexpr int kThreads = GroupNormApply<int>::kThreads;
  // A last block's idle threads count too, since they compute their index before they leave.
  bool wide = always_wide || count + kThreads > kNarrow;
  for (int k = 0; k < 3; ++k) wide = wide || extent(loop, k) > kNarrow;
  irt_launch* const launch = add_launch(plan, count, kThreads, status);
  if (!launch) return false;
  (wide ? fill<long long> : fill<int>)(*launch, x, to, loop, first, count, pack, call.act == Act::silu);
  snprintf(launch->entry, sizeof launch->entry, "irt::group_norm_silu_apply<%s, %d, %s, %s>", type.name, pack,
           own_lines ? "true" : "false", wide ? "long long" : "int");
  return true;
}

void planned(const irt_call& given, irt_plan& plan, irt_status& status, bool always_wide) {
  GroupNormCall call;
  if (!call.read(given, status)) return;
  const irt_view& out = *call.out;
  const Storage type = storage(out.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const int64_t batch = out.sizes[0], channels = out.sizes[1], planes = batch * channels;
  if (planes * out.sizes[2] * out.sizes[3] == 0) return;  // no launches: nothing to do

  const irt_view* const parts[] = {call.x, call.second};
  const int side = side_by_side(call.x->sizes[1] ? *call.x : *call.second);
  GroupNormLines lines{};
  int64_t first = 0;
  for (const irt_view* part : parts) {
    if (!part || part->sizes[1] == 0) continue;
    if (!measure(plan, *part, type.name, side, first, channels, planes, lines.moments, status)) return;
    first += part->sizes[1];
  }
  static_assert(sizeof(PlaneMoments::Part) == sizeof(PlaneMoments::Line));
  plan.workspace_bytes = planes * (lines.moments.tiles + 1) * static_cast<int64_t>(sizeof(PlaneMoments::Part));
  lines.groups = static_cast<int>(call.groups);
  lines.side = static_cast<int>(channels / call.groups);
  lines.weight = vector_of(call.weight);
  lines.bias = vector_of(call.bias);
  lines.scale = vector_of(call.scale);
  lines.shift = vector_of(call.shift);
  lines.eps = call.eps;
  irt_launch* const launch =
      add_launch(plan, batch * call.groups * GroupNormLines::kThreads, GroupNormLines::kThreads, status);
  if (!launch) return;
  launch->shared_bytes = sizeof(GroupNormLines::Memory);
  snprintf(launch->entry, sizeof launch->entry, "irt::group_norm_silu_lines<%s, %d>", type.name, side);
  set_params(*launch, lines);

  first = 0;
  for (const irt_view* part : parts) {
    if (!part || part->sizes[1] == 0) continue;
    if (!apply(plan, call, *part, first, type, always_wide, status)) return;
    first += part->sizes[1];
  }
}

void group_norm_silu(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, false); }

// The same with 64-bit offsets whatever the size: what tests compare with, where 2^31 elements do not fit.
void group_norm_silu_wide(const irt_call& call, irt_plan& plan, irt_status& status) {
  planned(call, plan, status, true);
}

}  // namespace

IRT_PLAN(group_norm_silu)
IRT_PLAN(group_norm_silu_wide)

}  // namespace irt::plan
