// gated_conv2d on the CPU: the engine (conv.h), with feature and gate of a pixel finished together.
#include "conv_call.h"

namespace irt::INPAINTRT_ISA {
namespace {

enum { kX, kWeight, kBias, kStride, kPadding, kDilation, kMode, kActivation, kAlpha, kGain, kArguments };

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, conv::Call& c) {
  const irt_value* a = call.args;
  c.out = &call.outs[0], c.threads = call.threads, c.ieee = call.ieee, c.gated = c.wide = true, c.upsample = 1;
  if (const char* fault = conv::read_image(a[kX], c)) return fault;
  if (const char* fault = conv::read_weight(a[kWeight], c)) return fault;
  if (const char* fault = conv::read_geometry(a[kStride], a[kPadding], a[kDilation], c)) return fault;
  if (const char* fault = conv::read_mode(a[kMode], c)) return fault;
  if (const char* fault = conv::read_activation(a[kActivation], a[kAlpha], c)) return fault;
  if (const char* fault = conv::read_vector(a[kBias], c.weight->sizes[0], c, c.bias)) return fault;
  if (!is_number_or_none(a[kGain])) return "gain must be a number";
  c.gain = static_cast<float>(float_arg(a[kGain], 1.0));
  return conv::check_sizes(c);
}

// (x, weight, bias | none, stride, padding[4], dilation, padding_mode, activation, alpha, gain) -> out
bool understood(const irt_call& call, conv::Call& c, irt_status& status) {
  if (call.nargs != kArguments || call.nouts != 1) {
    fail(status, IRT_BAD_ARGUMENT, "expected the 10 arguments of gated_conv2d and one output");
  } else if (const char* fault = read(call, c)) {
    fail(status, IRT_BAD_ARGUMENT, fault);
  }
  return status.code == IRT_OK;
}

void gated_conv2d(const irt_call& call, irt_status& status) {
  conv::Call c{};
  if (understood(call, c, status)) conv::run(c, status);
}

void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  conv::Call c{};
  if (understood(call, c, status)) conv::choose(c, choice);
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(gated_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
