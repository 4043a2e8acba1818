// fused_conv2d on the CPU: which calls have an algorithm, and which one.
//
// 3×3 convolutions of stride 1 are Winograd's F(4×4, 3×3), 1×1 convolutions a product; padding, bias, activation and
// residual are part of both. What neither covers is refused by the op and runs as torch's convolution. Data are float,
// for products also bf16: Winograd's transforms cancel more than its 8 bits bear.
#include "arena.h"
#include "conv_pointwise.h"
#include "conv_winograd.h"
#include "kernel.h"

namespace irt::INPAINTRT_ISA {
namespace {

using conv::Call;
using conv::Padding;

const irt_view* optional(const irt_value& value) { return value.kind == IRT_TENSOR ? value.tensors : nullptr; }
bool is(const irt_value& value, const char* text) { return value.kind == IRT_STRING && !strcmp(value.s, text); }
bool is_int(const irt_value& value, int64_t wanted) { return value.kind == IRT_INT && value.i == wanted; }

// The arguments in schema order.
enum {
  kX,
  kWeight,
  kBias,
  kStride,
  kPadding,
  kDilation,
  kGroups,
  kMode,
  kMask,
  kUpsample,
  kTransposed,
  kOutputPadding,
  kScale,
  kShift,
  kActivation,
  kAlpha,
  kResidual,
  kResidualMode,
  kArguments
};

// Why the call is not one of this op, or null.
const char* read(const irt_call& call, Call& c) {
  const irt_value* a = call.args;
  c.x = optional(a[kX]), c.weight = optional(a[kWeight]), c.out = &call.outs[0], c.threads = call.threads;
  if (!c.x || !c.weight) return "x and weight must be tensors";
  const int dtype = c.x->dtype;
  const auto fits = [dtype](const irt_view& view, int rank) { return view.ndim == rank && view.dtype == dtype; };
  if (!fits(*c.x, 4) || !fits(*c.weight, 4) || !fits(*c.out, 4)) {
    return "x, weight and the output must be 4-D tensors of one dtype";
  }
  c.bias = optional(a[kBias]), c.residual = optional(a[kResidual]);
  const int64_t outputs = c.weight->sizes[0];
  if (c.bias && (!fits(*c.bias, 1) || c.bias->sizes[0] != outputs)) return "bias must be (Cout,) of x's dtype";
  if (c.residual && (!fits(*c.residual, 4) || memcmp(c.residual->sizes, c.out->sizes, 4 * sizeof(int64_t)))) {
    return "residual must have the output's shape and dtype";
  }
  if (a[kPadding].kind != IRT_INTS || a[kPadding].count != 4) return "padding must be (top, left, bottom, right)";
  c.top = a[kPadding].ints[0], c.left = a[kPadding].ints[1];
  c.bottom = a[kPadding].ints[2], c.right = a[kPadding].ints[3];
  c.padding = is(a[kMode], "reflect")     ? Padding::reflect
              : is(a[kMode], "replicate") ? Padding::replicate
                                          : Padding::zeros;
  if (c.padding == Padding::zeros && !is(a[kMode], "zeros")) return "unknown padding mode";
  if (a[kActivation].kind != IRT_STRING || !parse_activation(a[kActivation].s, c.act)) return "unknown activation";
  if (!is_number_or_none(a[kAlpha])) return "alpha must be a number or none";
  c.alpha = static_cast<float>(float_arg(a[kAlpha], default_alpha(c.act)));
  c.residual_first = is(a[kResidualMode], "before");
  if (!c.residual_first && !is(a[kResidualMode], "after")) return "residual_mode must be before or after";
  const int64_t *in = c.x->sizes, *out = c.out->sizes;
  if (in[1] < 1 || outputs < 1 || c.weight->sizes[1] != in[1] || out[0] != in[0] || out[1] != outputs) {
    return "channels or batch do not fit";
  }
  const int64_t pads[] = {c.top, c.left, c.bottom, c.right};
  const int64_t reach = c.weight->sizes[2] - 1;
  for (int i = 0; i < 4; ++i) {
    const int64_t size = in[2 + i % 2];
    if (pads[i] < 0 || pads[i] > reach || size < 1)
      return "padding must be less than the kernel, and the image not empty";
    if (c.padding == Padding::reflect && pads[i] >= size) return "reflection needs more rows and columns than padding";
  }
  if (out[2] != in[2] + c.top + c.bottom - reach || out[3] != in[3] + c.left + c.right - reach || out[2] < 1 ||
      out[3] < 1) {
    return "the output's size does not fit";
  }
  return nullptr;
}

// The side of a kernel that has an algorithm; 0 for other calls.
int64_t covered(const irt_call& call) {
  const irt_value* a = call.args;
  if (call.nargs != kArguments || !optional(a[kWeight]) || optional(a[kWeight])->ndim != 4) return 0;
  const int64_t *size = optional(a[kWeight])->sizes, side = size[2] == size[3] ? size[2] : 0;
  const bool plain = is_int(a[kStride], 1) && is_int(a[kDilation], 1) && is_int(a[kGroups], 1) &&
                     is_int(a[kUpsample], 1) && is_int(a[kTransposed], 0) && a[kMask].kind == IRT_NONE &&
                     a[kScale].kind == IRT_NONE && a[kShift].kind == IRT_NONE;
  return plain && (side == 1 || side == 3) ? side : 0;
}

template <class Algorithm>
void run(const Call& call, irt_status& status) {
  const typename Algorithm::Geometry g(call);
  const Workspace space(static_cast<size_t>(g.floats()) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  Algorithm(call, g, static_cast<float*>(space.data())).run();
}

// (x, weight, bias | none, stride, padding[4], dilation, groups, padding_mode, mask | none, upsample, transposed,
//  output_padding, scale | none, shift | none, activation, alpha, residual | none, residual_mode) -> out
void fused_conv2d(const irt_call& call, irt_status& status) {
  if (call.nargs != kArguments || call.nouts != 1) {
    return fail(status, IRT_BAD_ARGUMENT, "expected the 18 arguments of fused_conv2d and one output");
  }
  const int64_t side = covered(call);
  if (!side) return fail(status, IRT_UNSUPPORTED, "only plain 1x1 and 3x3 convolutions of stride 1 have a kernel");
  Call c{};
  if (const char* fault = read(call, c)) return fail(status, IRT_BAD_ARGUMENT, fault);
  if (c.x->sizes[0] == 0) return;
  if (!conv::fits(c)) return fail(status, IRT_OUT_OF_MEMORY, "no memory for a workspace of that size");
  if (side == 1 && c.x->dtype == IRT_F32) return run<conv::Pointwise<float>>(conv::Flat(c).call, status);
  if (side == 1 && c.x->dtype == IRT_BF16) return run<conv::Pointwise<bf16>>(conv::Flat(c).call, status);
  if (side == 3 && c.x->dtype == IRT_F32) return run<conv::Winograd>(c, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32, or bfloat16 for 1x1 convolutions");
}

}  // namespace

IRT_CPU_KERNEL(fused_conv2d)

}  // namespace irt::INPAINTRT_ISA
