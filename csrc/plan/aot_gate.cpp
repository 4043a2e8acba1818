// Launch plan of aot_gate: how pixels are cut into tiles; for the blend, merge dimensions, pick pack and offset width.
#include "aot_gate.h"

#include <utility>

#include "plan.h"

namespace irt::plan {
namespace {

using Params = AotGate;

constexpr int kLine = AotBlend<int>::kLine;
const char* const kTooLarge = "the tensors have more elements than one launch can cover";

int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Whether packs of n elements lie at addresses that their size divides, in all operands but the lines; those are a
// pack's own, or one for all of it.
bool packs(const Loop<5>& loop, int n) {
  const int last = loop.ndim - 1;
  if (loop.sizes[last] % n || loop.strides[kLine][last] > 1) return false;
  for (int k = 0; k < kLine; ++k) {
    if (loop.strides[k][last] != 1) return false;
    for (int d = 0; d < last; ++d) {
      if (loop.strides[k][d] % n) return false;
    }
  }
  return true;
}

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

  Params p{};
  p.gate = gate.data;
  p.eps = float_arg(call.args[3], 1e-9);
  int64_t rows = gate.sizes[2], width = gate.sizes[3], row = gate.strides[2], pixel = gate.strides[3];
  if (width == 1 || (rows > 1 && row < pixel)) std::swap(rows, width), std::swap(row, pixel);
  const bool inner = channels > 1 && gate.strides[1] < pixel;
  const int side = inner ? Params::kChannels : 1, block_pixels = Params::pixels_of_block(side);
  const int64_t planes = batch * channels, tiles = up(pixels, block_pixels),
                blocks = batch * up(channels, side) * tiles;
  if (pixels > kNarrow - block_pixels || blocks > kMaxBlocks || planes > kMaxBlocks) {
    return fail(status, IRT_UNSUPPORTED, kTooLarge);
  }
  const int64_t strides[] = {gate.strides[0], gate.strides[1], row, pixel};
  for (int d = 0; d < 4; ++d) p.strides[d] = strides[d];
  p.channels = static_cast<int>(channels);
  p.pixels = static_cast<int>(pixels);
  p.tiles = static_cast<int>(tiles);
  p.width = Divisor<int>::of(static_cast<int>(rows == 1 || row == pixel * width ? pixels : width));
  p.parts_at = planes;
  static_assert(sizeof(Params::Part) == sizeof(Params::Line));
  plan.workspace_bytes = planes * (tiles + 1) * static_cast<int64_t>(sizeof(Params::Part));

  irt_launch* launch = add_launch(plan, blocks * Params::kThreads, Params::kThreads, status);
  if (!launch) return;
  launch->shared_bytes = sizeof(Params::TileMemory);
  snprintf(launch->entry, sizeof launch->entry, "irt::aot_gate_moments<%s, %d>", type.name, side);
  set_params(*launch, p);
  launch = add_launch(plan, planes * Params::kLineThreads, Params::kLineThreads, status);
  if (!launch) return;
  launch->shared_bytes = sizeof(Params::LineMemory);
  snprintf(launch->entry, sizeof launch->entry, "irt::aot_gate_lines<%d>", side);
  set_params(*launch, p);

  const int64_t of_lines[] = {channels, 1, 0, 0};
  const Loop<5> loop(4, out.sizes, {out.strides, x.strides, fuse.strides, gate.strides, of_lines});  // as in AotBlend
  const bool vector =
      packs(loop, type.per_vector) && aligned(x.data) && aligned(fuse.data) && aligned(gate.data) && aligned(out.data);
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
