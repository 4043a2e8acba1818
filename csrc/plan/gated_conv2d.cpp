// Launch plan of gated_conv2d: weights packed so that a tile holds features and their gates, then the convolution
// (conv2d_call.h).
#include "gated_conv2d.h"

#include "conv2d_call.h"

namespace irt::plan {
namespace {

enum { kX, kWeight, kBias, kStride, kPadding, kDilation, kMode, kActivation, kAlpha, kGain, kArguments };

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, conv2d::Arguments& arguments) {
  if (call.nargs != kArguments || call.nouts != 1) return "expected the 10 arguments of gated_conv2d and one output";
  const irt_value* a = call.args;
  conv::Call& c = arguments.call;
  c.out = &call.outs[0], c.gated = true;
  if (const char* fault = conv2d::read_image(a[kX], nullptr, arguments)) return fault;
  if (const char* fault = conv2d::read_weight(a[kWeight], 1, arguments)) return fault;
  if (const char* fault = conv2d::read_geometry(a[kStride], a[kPadding], a[kDilation], arguments)) return fault;
  if (const char* fault = conv::read_mode(a[kMode], c)) return fault;
  if (const char* fault = conv::read_activation(a[kActivation], a[kAlpha], c)) return fault;
  if (!is_number_or_none(a[kGain])) return "gain must be a number";
  if (const char* fault = conv::read_vector(a[kBias], arguments.all.sizes[0], c, c.bias)) return fault;
  return conv2d::check_sizes(arguments);
}

void gated_conv2d(const irt_call& call, irt_plan& plan, irt_status& status) {
  conv2d::Arguments arguments;
  if (const char* fault = read(call, arguments)) return fail(status, IRT_BAD_ARGUMENT, fault);
  GatedConv2d p{};
  conv2d::Choice choice{};
  if (!conv2d::prepare(arguments, call, p.conv, choice, plan, status)) return;
  p.bias = conv2d::vector(arguments.call.bias);
  p.act = static_cast<int>(arguments.call.act), p.alpha = arguments.call.alpha;
  p.gain = static_cast<float>(float_arg(call.args[kGain], 1.0));
  conv2d::finish("gated_conv2d", p, choice, plan, status);
}

}  // namespace

IRT_PLAN(gated_conv2d)

}  // namespace irt::plan
