// Launch plan of fused_conv2d: weights packed in the order of the sum, then the convolution (conv2d_call.h).
#include "fused_conv2d.h"

#include "conv2d_call.h"

namespace irt::plan {
namespace {

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
  kSecond,
  kSecondWeight,
  kArguments
};

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, conv2d::Arguments& arguments) {
  if (call.nargs != kArguments || call.nouts != 1) return "expected the 20 arguments of fused_conv2d and one output";
  const irt_value* a = call.args;
  if (a[kSecondWeight].kind != IRT_NONE) return "a second part of x with a weight of its own has no kernel";
  conv::Call& c = arguments.call;
  c.out = &call.outs[0];
  if (const char* fault = conv2d::read_image(a[kX], &a[kSecond], arguments)) return fault;
  for (const int i : {kGroups, kUpsample, kTransposed, kOutputPadding}) {
    if (a[i].kind != IRT_INT) return "groups, upsample, transposed and output_padding must be integers";
  }
  if (const char* fault = conv2d::read_weight(a[kWeight], a[kGroups].i, arguments)) return fault;
  if (const char* fault = conv2d::read_geometry(a[kStride], a[kPadding], a[kDilation], arguments)) return fault;
  if (const char* fault = conv::read_mode(a[kMode], c)) return fault;
  if (const char* fault = conv::read_activation(a[kActivation], a[kAlpha], c)) return fault;
  c.upsample = a[kUpsample].i, c.transposed = a[kTransposed].i != 0;
  if (c.upsample != 1 && c.upsample != 2) return "upsample must be 1 or 2";
  if (c.transposed && (c.upsample != 1 || c.padding != conv::Padding::zeros)) {
    return "a transposed convolution takes zero padding and no upsampling";
  }
  const int64_t more = a[kOutputPadding].i, outputs = arguments.all.sizes[c.transposed ? 1 : 0];
  if (more < 0 || (more && !c.transposed) || more > conv2d::kMostSize) {
    return "output_padding must be 0 unless transposed";
  }
  if (const char* fault = conv::read_mask(a[kMask], c)) return fault;
  if (const char* fault = conv::read_vector(a[kBias], outputs, c, c.bias)) return fault;
  if (const char* fault = conv::read_vector(a[kScale], outputs, c, c.scale)) return fault;
  if (const char* fault = conv::read_vector(a[kShift], outputs, c, c.shift)) return fault;
  c.residual = conv::optional(a[kResidual]), c.residual_first = conv::is(a[kResidualMode], "before");
  if (!c.residual_first && !conv::is(a[kResidualMode], "after")) return "residual_mode must be before or after";
  return conv2d::check_sizes(arguments, more);
}

void fused_conv2d(const irt_call& call, irt_plan& plan, irt_status& status) {
  conv2d::Arguments arguments;
  if (const char* fault = read(call, arguments)) return fail(status, IRT_BAD_ARGUMENT, fault);
  const conv::Call& c = arguments.call;
  FusedConv2d p{};
  conv2d::Choice choice{};
  if (!conv2d::prepare(arguments, call, p.conv, choice, plan, status)) return;
  p.bias = conv2d::vector(c.bias), p.scale = conv2d::vector(c.scale), p.shift = conv2d::vector(c.shift);
  p.residual = conv2d::tensor(c.residual), p.residual_first = c.residual_first;
  p.act = static_cast<int>(c.act), p.alpha = c.alpha;
  conv2d::finish("fused_conv2d", p, choice, plan, status);
}

}  // namespace

IRT_PLAN(fused_conv2d)

}  // namespace irt::plan
