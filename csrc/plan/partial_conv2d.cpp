// Launch plan of partial_conv2d: sums of the mask over windows, weights packed in the order of the sum, then the
// convolution of x · mask (conv2d_call.h).
#include "partial_conv2d.h"

#include "conv2d_call.h"

namespace irt::plan {
namespace {

enum { kX, kMask, kWeight, kBias, kStride, kPadding, kDilation, kScale, kEps, kArguments };

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, conv2d::Arguments& arguments) {
  if (call.nargs != kArguments || call.nouts != 2) return "expected the 9 arguments of partial_conv2d and two outputs";
  const irt_value* a = call.args;
  conv::Call& c = arguments.call;
  c.out = &call.outs[0];
  if (const char* fault = conv2d::read_image(a[kX], nullptr, arguments)) return fault;
  if (const char* fault = conv2d::read_weight(a[kWeight], 1, arguments)) return fault;
  if (const char* fault = conv2d::read_geometry(a[kStride], a[kPadding], a[kDilation], arguments)) return fault;
  if (const char* fault = conv::read_mask(a[kMask], c)) return fault;
  if (!c.mask) return "mask must be a tensor";
  if (!conv::is(a[kScale], "window") && !conv::is(a[kScale], "one")) return "scale must be window or one";
  if (!is_number_or_none(a[kEps])) return "eps must be a number";
  if (const char* fault = conv::read_vector(a[kBias], arguments.all.sizes[0], c, c.bias)) return fault;
  if (const char* fault = conv2d::check_sizes(arguments)) return fault;
  const irt_view &out = *c.out, &updated = call.outs[1];
  const int64_t area = out.sizes[2] * out.sizes[3];
  const bool alike = updated.ndim == 4 && updated.dtype == out.dtype && updated.sizes[0] == out.sizes[0] &&
                     updated.sizes[1] == 1 && updated.sizes[2] == out.sizes[2] && updated.sizes[3] == out.sizes[3];
  const auto dense = [&updated](int d, int64_t stride) {
    return updated.sizes[d] == 1 || updated.strides[d] == stride;
  };
  const bool contiguous = alike && (updated.sizes[0] == 0 || (dense(0, area) && dense(2, out.sizes[3]) && dense(3, 1)));
  return contiguous ? nullptr : "the updated mask must be (B, 1, H', W') of x's dtype, contiguous";
}

// The launches that sum the mask; the sums lie behind `used` bytes of the workspace.
bool add_sums(const conv2d::Arguments& arguments, const irt_call& call, const Conv2d& conv, int64_t used,
              const char* type, PartialSums& p, irt_plan& plan, irt_status& status) {
  const irt_view &mask = *arguments.call.mask, &updated = call.outs[1];
  p.mask = conv2d::tensor(&mask);
  p.channels = static_cast<int>(mask.sizes[1]);
  p.samples = static_cast<int>(mask.sizes[0]);
  p.copies = static_cast<int>(updated.sizes[0] / mask.sizes[0]);
  p.updated = updated.data;
  p.stride = conv.stride, p.dilation = conv.dilation;
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = conv.kernel[axis], p.before[axis] = conv.before[axis];
    p.size[axis] = conv.size[axis], p.out_size[axis] = conv.out_size[axis];
  }
  const int64_t pixels = mask.sizes[0] * mask.sizes[2] * mask.sizes[3];
  const int64_t windows = mask.sizes[0] * updated.sizes[2] * updated.sizes[3];
  constexpr int64_t kFloat = sizeof(float);
  p.sums_at = used;
  p.plane_at = p.channels > 1 ? used + windows * kFloat : -1;
  plan.workspace_bytes = used + (windows + (p.channels > 1 ? pixels : 0)) * kFloat;
  if (pixels > kNarrow - PartialSums::kThreads || windows > kNarrow - PartialSums::kThreads) {
    fail(status, IRT_UNSUPPORTED, conv2d::kTooLarge);
    return false;
  }
  for (const bool plane : {true, false}) {
    if (plane && p.channels == 1) continue;
    irt_launch* const launch = add_launch(plan, plane ? pixels : windows, PartialSums::kThreads, status);
    if (!launch) return false;
    snprintf(launch->entry, sizeof launch->entry, "irt::partial_conv2d_%s<%s>", plane ? "plane" : "sums", type);
    set_params(*launch, p);
  }
  return true;
}

void partial_conv2d(const irt_call& call, irt_plan& plan, irt_status& status) {
  conv2d::Arguments arguments;
  if (const char* fault = read(call, arguments)) return fail(status, IRT_BAD_ARGUMENT, fault);
  const conv::Call& c = arguments.call;
  PartialConv2d p{};
  PartialSums sums{};
  conv2d::Choice choice{};
  if (!conv2d::prepare(arguments, call, p.conv, choice, plan, status) || !plan.count) return;
  if (!add_sums(arguments, call, p.conv, plan.workspace_bytes, choice.type, sums, plan, status)) return;
  p.bias = conv2d::vector(c.bias);
  p.sums_at = sums.sums_at;
  p.sums_of_sample = c.mask->sizes[0] > 1 ? c.out->sizes[2] * c.out->sizes[3] : 0;
  const int64_t window = c.mask->sizes[1] * c.weight->sizes[2] * c.weight->sizes[3];
  p.window = conv::is(call.args[kScale], "window") ? static_cast<float>(window) : 1.0f;
  p.eps = static_cast<float>(float_arg(call.args[kEps], 1e-8));
  conv2d::finish("partial_conv2d", p, choice, plan, status);
}

}  // namespace

IRT_PLAN(partial_conv2d)

}  // namespace irt::plan
