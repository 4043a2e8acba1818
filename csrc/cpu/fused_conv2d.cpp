// fused_conv2d on the CPU: the engine (conv.h) with all that surrounds a convolution.
#include "conv_call.h"

namespace irt::INPAINTRT_ISA {
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
const char* read(const irt_call& call, irt_view (&parts)[2], conv::Call& beside, conv::Call& c) {
  const irt_value* a = call.args;
  c.out = &call.outs[0], c.threads = call.threads, c.ieee = call.ieee, c.wide = true, c.gain = 1.0f;
  if (const char* fault = conv::read_image(a[kX], c)) return fault;
  if (const char* fault = conv::read_weight(a[kWeight], c)) return fault;
  const irt_view *second = conv::optional(a[kSecond]), *more_weight = conv::optional(a[kSecondWeight]);
  const bool in_two = a[kSecondWeight].kind != IRT_NONE;
  const bool is_beside = in_two && !(more_weight && more_weight->ndim == 4 &&
                                     !memcmp(more_weight->sizes + 2, c.weight->sizes + 2, 2 * sizeof(int64_t)));
  if (second && !is_beside) {
    parts[0] = *c.x, parts[1] = *second;
    if (const char* fault = conv::join(parts, c)) return fault;
  }
  if (const char* fault = conv::read_geometry(a[kStride], a[kPadding], a[kDilation], c)) return fault;
  if (const char* fault = conv::read_mode(a[kMode], c)) return fault;
  if (const char* fault = conv::read_activation(a[kActivation], a[kAlpha], c)) return fault;
  for (const int flag : {kUpsample, kTransposed, kOutputPadding}) {
    if (a[flag].kind != IRT_INT) return "upsample, transposed and output_padding must be integers";
  }
  c.upsample = a[kUpsample].i, c.transposed = a[kTransposed].i != 0;
  if (c.upsample != 1 && c.upsample != 2) return "upsample must be 1 or 2";
  if (c.transposed && (c.upsample != 1 || c.padding != conv::Padding::zeros)) {
    return "a transposed convolution takes zero padding and no upsampling";
  }
  if (in_two && !is_beside) {
    if (const char* fault = conv::read_rest(a[kSecondWeight], c)) return fault;
  }
  const int64_t more = a[kOutputPadding].i, outputs = c.weight->sizes[c.transposed ? 1 : 0];
  if (more < 0 || (more && !c.transposed) || more > (int64_t{1} << 40))
    return "output_padding must be 0 unless transposed";
  if (const char* fault = conv::read_mask(a[kMask], c)) return fault;
  if (const char* fault = conv::read_vector(a[kBias], outputs, c, c.bias)) return fault;
  if (const char* fault = conv::read_vector(a[kScale], outputs, c, c.scale)) return fault;
  if (const char* fault = conv::read_vector(a[kShift], outputs, c, c.shift)) return fault;
  c.residual = conv::optional(a[kResidual]), c.residual_first = conv::is(a[kResidualMode], "before");
  if (!c.residual_first && !conv::is(a[kResidualMode], "after")) return "residual_mode must be before or after";
  if (is_beside) {
    if (c.out->ndim != 4) return "the output must be 4-D";
    if (const char* fault = conv::read_beside(second, a[kSecondWeight], c, beside)) return fault;
  }
  return conv::check_sizes(c, more);
}

// (x, weight, bias | none, stride, padding[4], dilation, groups, padding_mode, mask | none, upsample,
//  transposed, output_padding, scale | none, shift | none, activation, alpha, residual | none, residual_mode,
//  second part of x | none, weight of that part, of the same kernel or 1×1 | none) -> out
bool understood(const irt_call& call, irt_view (&parts)[2], conv::Call& beside, conv::Call& c, irt_status& status) {
  if (call.nargs != kArguments || call.nouts != 1) {
    fail(status, IRT_BAD_ARGUMENT, "expected the 20 arguments of fused_conv2d and one output");
  } else if (call.args[kGroups].kind != IRT_INT || call.args[kGroups].i != 1) {
    fail(status, IRT_UNSUPPORTED, "only convolutions in one group have a kernel");
  } else if (const char* fault = read(call, parts, beside, c)) {
    fail(status, IRT_BAD_ARGUMENT, fault);
  }
  return status.code == IRT_OK;
}

void fused_conv2d(const irt_call& call, irt_status& status) {
  conv::Call c{}, beside{};
  irt_view parts[2];
  if (understood(call, parts, beside, c, status)) conv::run(c, status);
}

void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  conv::Call c{}, beside{};
  irt_view parts[2];
  if (understood(call, parts, beside, c, status)) conv::choose(c, choice);
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(fused_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
