// Launch plan of window_attention: how wide heads are in shared memory, how many queries a block takes, what is moved
// at once.
#include "window_attention.h"

#include <cmath>

#include "windows_call.h"

namespace irt::plan {
namespace {

using Params = WindowAttention;

int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

constexpr int64_t kEnoughBlocks = 128;  // fewer leave SMs of a large GPU idle

bool fits(const irt_view& a, const irt_view& b) {
  return a.ndim == 4 && b.ndim == 4 && a.dtype == b.dtype && !memcmp(a.sizes, b.sizes, 4 * sizeof a.sizes[0]);
}

// Whether an addend has these sizes (the first of them or 1), in the dtype of `out` or float32.
bool is_addend(const irt_value& value, const irt_view& out, int ndim, const int64_t* sizes) {
  if (value.kind == IRT_NONE) return true;
  if (value.kind != IRT_TENSOR) return false;
  const irt_view& view = *value.tensors;
  if (view.ndim != ndim || (view.dtype != out.dtype && view.dtype != IRT_F32)) return false;
  for (int d = 0; d < ndim; ++d) {
    if (view.sizes[d] != sizes[d] && !(d == 0 && ndim == 4 && view.sizes[0] == 1)) return false;
  }
  return true;
}

bool formed(const irt_call& call) {
  if (call.nargs != 10 || call.nouts != 1) return false;
  const irt_view& out = call.outs[0];
  for (int i = 0; i < 3; ++i) {
    if (call.args[i].kind != IRT_TENSOR || !fits(*call.args[i].tensors, out)) return false;
  }
  const irt_value &size = call.args[3], &heads = call.args[4];
  if (!divide(out, size, call.args[5]) || heads.kind != IRT_INT || heads.i < 1 || out.sizes[3] == 0 ||
      out.sizes[3] % heads.i || !is_number_or_none(call.args[6]) || !is_number_or_none(call.args[9])) {
    return false;
  }
  const int64_t of_mask[] = {out.sizes[0], out.sizes[1], out.sizes[2], 1};
  const int64_t tokens = size.i <= 4096 ? size.i * size.i : -1, of_bias[] = {heads.i, tokens, tokens};
  return is_addend(call.args[7], out, 4, of_mask) && is_addend(call.args[8], out, 3, of_bias);
}

Params::Tensor tensor(const irt_view& view, int bytes, int64_t channels) {
  Params::Tensor t{};
  t.data = view.data;
  for (int d = 0; d < 4; ++d) t.strides[d] = view.strides[d];
  t.pack = 16 / bytes;
  const auto whole = [&](int pack) {
    bool is = reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(pack * bytes) == 0;
    is = is && channels % pack == 0 && (view.strides[3] == 1 || view.sizes[3] == 1);
    for (int d = 0; d < 3; ++d) is = is && (view.strides[d] % pack == 0 || view.sizes[d] == 1);
    return is;
  };
  while (t.pack > 1 && !whole(t.pack)) t.pack /= 2;
  return t;
}

template <class Addend>
Addend addend(const irt_value& value) {
  Addend a{};
  if (value.kind == IRT_NONE) return a;
  const irt_view& view = *value.tensors;
  a.data = view.data;
  for (int d = 0; d < 3; ++d) a.strides[d] = view.sizes[d] == 1 ? 0 : view.strides[d];
  a.wide = view.dtype == IRT_F32;
  return a;
}

// (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) -> out
void window_attention(const irt_call& call, irt_plan& plan, irt_status& status) {
  if (!formed(call)) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) and one output, all "
                "maps (B, H, W, C) of one dtype, which the windows divide");
  }
  const irt_view& out = call.outs[0];
  const Storage type = storage(out.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const int bytes = 16 / type.per_vector;
  const int64_t heads = call.args[4].i, channels = out.sizes[3] / heads;
  if (channels > Params::kMost) return fail(status, IRT_UNSUPPORTED, "a head must have at most 64 channels");

  Params p{};
  const int64_t windows = plan::windows(out, call.args[3], call.args[5], p.windows, status);
  if (windows <= 0) return;                                                              // refused, or nothing to do
  const int64_t pairs = windows * heads, parts = up(p.windows.tokens(), Params::kRows);  // of 16 queries
  int warps = Params::kWarps;
  while (warps > 1 && (warps / 2 >= parts || pairs * up(parts, warps) < kEnoughBlocks)) warps /= 2;
  const int64_t blocks = up(parts, warps);
  if (heads > kMaxBlocks || pairs > kMaxBlocks / blocks) {
    return fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
  }
  p.q = tensor(*call.args[0].tensors, bytes, channels);
  p.k = tensor(*call.args[1].tensors, bytes, channels);
  p.v = tensor(*call.args[2].tensors, bytes, channels);
  p.out = tensor(out, bytes, channels);
  p.mask = addend<Params::Mask>(call.args[7]);
  p.bias = addend<Params::Bias>(call.args[8]);
  p.heads = Divisor<int>::of(static_cast<int>(heads));
  p.blocks = Divisor<int>::of(static_cast<int>(blocks));
  p.channels = static_cast<int>(channels);
  p.scale = static_cast<float>(float_arg(call.args[6], 1.0 / std::sqrt(static_cast<double>(channels))));
  p.mask_value = static_cast<float>(float_arg(call.args[9], -100.0));

  const int width = channels <= 16 ? 16 : channels <= 32 ? 32 : 64;
  irt_launch* const launch = add_launch(plan, pairs * blocks * (32 * warps), 32 * warps, status);
  if (!launch) return;
  launch->shared_bytes = static_cast<uint32_t>(Params::shared_bytes(bytes, width, warps));
  snprintf(launch->entry, sizeof launch->entry, "irt::window_attention%s<%s, %d>", p.bias.data ? "_biased" : "",
           type.name, width);
  set_params(*launch, p);
}

}  // namespace

IRT_PLAN(window_attention)

}  // namespace irt::plan
