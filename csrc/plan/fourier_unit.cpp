// Launch plan of fourier_unit: sizes of the blocks, fused columns or not, the workspace.
#include "fourier_unit.h"

#include <cmath>

#include "plan.h"

namespace irt::plan {
namespace {

using Params = FourierUnit;

constexpr int64_t kMostShared = 99 * 1024;         // that every GPU from sm_80 on grants a block
constexpr int64_t kEnoughShared = 48 * 1024;       // for blocks that could be smaller
constexpr int64_t kLongest = 3840;                 // of rows and columns: all up to this fit, prime or not
constexpr int64_t kMostPoints = int64_t{1} << 40;  // of the spectra together; as many take 8 TB
constexpr int64_t kPoint = 2 * sizeof(float);

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Params::Tensor tensor(const irt_view& view) {
  return {view.data, {view.strides[0], view.strides[1], view.strides[2], view.strides[3]}};
}

// Bytes of shared memory for `lines` transforms at a time, their twiddle factors and scratch.
int64_t shared_for(const Fft& fft, int64_t lines) { return kPoint * (lines * fft.pitch() + fft.n + fft.scratch); }
int64_t shared_for_rows(const Fft& fft, int64_t pairs) { return shared_for(fft, pairs) + up(2 * fft.n, 8); }

// How many lines a block takes: some thousand points, at least four lines if they fit, so that what it reads and writes
// across them are whole sectors of memory.
int lines_of_block(const Fft& fft, int64_t available) {
  int64_t lines = 1024 / fft.n;
  lines = lines < 4 ? 4 : lines > 32 ? 32 : lines;
  if (lines > available) lines = available;
  while (lines > 1 && shared_for_rows(fft, lines) > kEnoughShared) --lines;
  return static_cast<int>(lines);
}

// Fills in how the fused kernel shares its work; false where a column is too large for it.
bool fuse(Params& p, int per_lane, int64_t& shared) {
  p.lanes_tiles = static_cast<int>(up(p.height, 32 * per_lane) / (32 * per_lane));
  if (p.lanes_tiles > Params::kWarps) return false;
  p.rows_tiles = Params::kWarps / p.lanes_tiles;
  const int slice = p.rows_tiles * Params::kWarpChannels;
  const int64_t held = up(p.inputs, 2);
  shared = shared_for(p.column, held > slice ? held : slice);
  p.slice = Divisor<int>::of(slice);
  p.lines = Divisor<int>::of(p.inputs);
  return shared <= kMostShared;
}

bool is_tensor_or_none(const irt_value& v) { return v.kind == IRT_NONE || v.kind == IRT_TENSOR; }

const char* const kForm =
    "expected (x, weight, bias or none, residual or none) and one output, of one dtype: x (B, C, h, w), weight "
    "(2 Co, 2 C[, 1, 1]), bias (2 Co,), residual and output (B, Co, h, w)";

bool formed(const irt_call& call) {
  if (call.nargs != 4 || call.nouts != 1 || call.args[0].kind != IRT_TENSOR || call.args[1].kind != IRT_TENSOR ||
      !is_tensor_or_none(call.args[2]) || !is_tensor_or_none(call.args[3])) {
    return false;
  }
  const irt_view &x = *call.args[0].tensors, &weight = *call.args[1].tensors, &out = call.outs[0];
  bool fits = x.ndim == 4 && out.ndim == 4 && (weight.ndim == 2 || weight.ndim == 4);
  for (int d = 0; d < 4; ++d) fits = fits && (d == 1 || x.sizes[d] == out.sizes[d]);
  for (int d = 1; d < 4; ++d) fits = fits && x.sizes[d] > 0 && out.sizes[d] > 0;
  fits = fits && weight.sizes[0] == 2 * out.sizes[1] && weight.sizes[1] == 2 * x.sizes[1];
  fits = fits && (weight.ndim == 2 || (weight.sizes[2] == 1 && weight.sizes[3] == 1));
  fits = fits && x.dtype == out.dtype && weight.dtype == out.dtype;
  if (call.args[2].kind == IRT_TENSOR) {
    const irt_view& bias = *call.args[2].tensors;
    fits = fits && bias.ndim == 1 && bias.sizes[0] == weight.sizes[0] && bias.dtype == out.dtype;
  }
  if (call.args[3].kind == IRT_TENSOR) {
    const irt_view& residual = *call.args[3].tensors;
    fits = fits && residual.ndim == 4 && residual.dtype == out.dtype;
    for (int d = 0; d < 4; ++d) fits = fits && residual.sizes[d] == out.sizes[d];
  }
  return fits;
}

// (x, weight, bias, residual) -> out
void planned(const irt_call& call, irt_plan& plan, irt_status& status, bool may_fuse) {
  if (!formed(call)) return fail(status, IRT_BAD_ARGUMENT, kForm);
  const irt_view &x = *call.args[0].tensors, &weight = *call.args[1].tensors, &out = call.outs[0];
  const Storage type = storage(x.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const int64_t batch = x.sizes[0], inputs = x.sizes[1], outputs = out.sizes[1], h = x.sizes[2], w = x.sizes[3];
  if (h > kLongest || w > kLongest) return fail(status, IRT_UNSUPPORTED, "h and w must be at most 3840");
  if (inputs * h >= kNarrow || outputs * h >= kNarrow || inputs >= kNarrow / 4 || outputs >= kNarrow / 4) {
    return fail(status, IRT_UNSUPPORTED, "a column of all channels must have fewer than 2^31 elements");
  }
  const int64_t columns = batch * (w / 2 + 1);
  if (columns > kMaxBlocks || columns * (inputs + outputs) * h > kMostPoints) {
    return fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
  }
  if (batch == 0) return;  // no launches: nothing to do

  Params p{};
  p.x = tensor(x);
  p.out = tensor(out);
  if (call.args[3].kind == IRT_TENSOR) p.residual = tensor(*call.args[3].tensors);
  p.weight = weight.data;
  for (int d = 0; d < 2; ++d) p.weight_strides[d] = weight.strides[d];
  if (call.args[2].kind == IRT_TENSOR) {
    p.bias = call.args[2].tensors->data;
    p.bias_stride = call.args[2].tensors->strides[0];
  }
  p.inputs = static_cast<int>(inputs);
  p.outputs = static_cast<int>(outputs);
  p.height = static_cast<int>(h);
  p.width = static_cast<int>(w);
  p.half = p.width / 2 + 1;
  p.channels_inner = inputs > 1 && x.strides[1] < x.strides[3];
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(h * w)));
  p.row = Fft::of(p.width);
  p.wide = Divisor<int>::of(p.width);
  p.column = Fft::of(p.height);
  p.tall = Divisor<int>::of(p.height);

  const int64_t vertical = up(h, 2) / 2;  // pairs of rows
  p.pairs =
      Divisor<int>::of(lines_of_block(p.row, p.channels_inner ? (inputs > outputs ? inputs : outputs) : vertical));
  const auto row_blocks = [&](int64_t channels) {
    const int64_t inner = p.channels_inner ? channels : vertical, outer = p.channels_inner ? vertical : channels;
    return batch * outer * (up(inner, p.pairs.value) / p.pairs.value);
  };

  const int per_lane = h <= 32 ? 1 : 2;
  int64_t shared = 0;
  const bool fused = may_fuse && fuse(p, per_lane, shared);
  if (!fused) {
    p.lines = Divisor<int>::of(lines_of_block(p.column, inputs > outputs ? inputs : outputs));
    p.slice = Divisor<int>::of(Params::kWarps * Params::kWarpChannels);
    shared = shared_for(p.column, p.lines.value);
  }
  p.slices = static_cast<int>(up(outputs, p.slice.value) / p.slice.value);
  p.weight_rows = 2 * p.slices * p.slice.value;
  p.weight_pitch = static_cast<int>(up(2 * inputs, 4));
  p.bias_at = static_cast<int64_t>(p.weight_rows) * p.weight_pitch;
  p.inputs_at = up(p.bias_at + p.weight_rows, 4);
  p.outputs_at = p.inputs_at + up(columns * inputs * h * 2, 4);
  plan.workspace_bytes = static_cast<int64_t>(sizeof(float)) * (p.outputs_at + columns * outputs * h * 2);

  // A launch of `blocks` blocks; its name is `kernel`<`instance`>.
  const auto add = [&](const char* kernel, const char* instance, int64_t blocks, int64_t bytes) {
    if (status.code != IRT_OK) return;
    irt_launch* const launch = add_launch(plan, blocks * Params::kThreads, Params::kThreads, status);
    if (!launch) return;
    launch->shared_bytes = static_cast<uint32_t>(bytes);
    snprintf(launch->entry, sizeof launch->entry, "irt::fourier_unit_%s<%s>", kernel, instance);
    set_params(*launch, p);
  };
  const int64_t row_shared = shared_for_rows(p.row, p.pairs.value);
  const char* const lanes = per_lane == 1 ? "1" : "2";
  p.row_blocks = static_cast<int>(row_blocks(inputs));
  add("rows", type.name, row_blocks(inputs) + p.weight_rows, row_shared);
  if (fused) {
    add("columns", lanes, columns * p.slices, shared);
  } else {
    const int64_t places = up(h, 32 * per_lane) / (32 * per_lane);
    const int64_t mix_shared = kPoint * Params::kMixChannels * (32 * per_lane + 1);
    add("transform", "false", columns * (up(inputs, p.lines.value) / p.lines.value), shared);
    add("mix", lanes, columns * places * p.slices, mix_shared);
    add("transform", "true", columns * (up(outputs, p.lines.value) / p.lines.value), shared);
  }
  add("inverse_rows", type.name, row_blocks(outputs), row_shared);
}

void fourier_unit(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, true); }

// The same with the columns in three launches whatever their size: what tests compare with.
void fourier_unit_unfused(const irt_call& call, irt_plan& plan, irt_status& status) {
  planned(call, plan, status, false);
}

}  // namespace

IRT_PLAN(fourier_unit)
IRT_PLAN(fourier_unit_unfused)

}  // namespace irt::plan
