// upfirdn2d on the CPU. Bound by memory: a pixel is read as often as the filter has rows, from a near cache.
#include "resample_image.h"

namespace irt::INPAINTRT_ISA {
namespace {

enum { kX, kFilter, kUp, kDown, kPadding, kFlip, kGain, kArguments };

bool pair(const irt_value& v) { return v.kind == IRT_INTS && v.count == 2; }
bool within(int64_t n, int64_t low, int64_t high) { return n >= low && n <= high; }

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, Resampling& filter, int64_t (&steps)[2]) {
  const irt_value* a = call.args;
  const irt_view &x = *a[kX].tensors, &f = *a[kFilter].tensors, &out = call.outs[0];
  if (x.ndim != 4 || out.ndim != 4 || x.dtype != out.dtype) return "x and the output must be 4-D, of one dtype";
  if (f.ndim != 2 || f.dtype != IRT_F32) return "f must be float32 (rows, columns)";
  for (int d = 0; d < 2; ++d) {
    if (!within(f.sizes[d], 1, kLongestFilter)) return "f must have 1 to 16 taps on a side";
  }
  if (!pair(a[kUp]) || !pair(a[kDown]) || a[kPadding].kind != IRT_INTS || a[kPadding].count != 4) {
    return "up and down must be pairs, padding (left, right, top, bottom)";
  }
  if (a[kFlip].kind != IRT_INT || !is_number_or_none(a[kGain])) return "flip_filter must be a bool, gain a number";
  const int64_t *pads = a[kPadding].ints, *ups = a[kUp].ints, *downs = a[kDown].ints;
  if (x.sizes[0] != out.sizes[0] || x.sizes[1] != out.sizes[1]) return "batch and channels of x and output differ";
  for (int d = 0; d < 2; ++d) {  // rows, columns
    const int64_t up = ups[1 - d], down = downs[1 - d], before = pads[2 - 2 * d], after = pads[3 - 2 * d];
    constexpr int64_t kMost = int64_t{1} << 40;
    if (!within(up, 1, kLargestFactor) || !within(down, 1, kLargestFactor)) return "up and down must be 1 to 8";
    if (!within(before, -kMost, kMost) || !within(after, -kMost, kMost) || !within(x.sizes[2 + d], 1, kMost)) {
      return "x is empty or its size or padding too large";
    }
    const int64_t reach = x.sizes[2 + d] * up + before + after - f.sizes[d];
    if (reach < 0 || out.sizes[2 + d] != reach / down + 1) return "the output's size does not fit";
  }
  filter.up_x = ups[0], filter.up_y = ups[1], filter.left = pads[0], filter.top = pads[2];
  filter.set(f, static_cast<float>(float_arg(a[kGain], 1.0)), a[kFlip].i != 0);
  steps[0] = downs[0], steps[1] = downs[1];
  return nullptr;
}

// (x, f, up[2], down[2], padding[4], flip_filter, gain) -> out
void upfirdn2d(const irt_call& call, irt_status& status) {
  if (call.nargs != kArguments || call.nouts != 1) {
    return fail(status, IRT_BAD_ARGUMENT, "expected the 7 arguments of upfirdn2d and one output");
  }
  const irt_view* x = tensor_arg(call, kX, status);
  if (!x || !tensor_arg(call, kFilter, status)) return;
  Resampling filter;
  int64_t steps[2];
  if (const char* fault = read(call, filter, steps)) return fail(status, IRT_BAD_ARGUMENT, fault);
  conv::Call c{};
  c.out = &call.outs[0], c.threads = call.threads, c.act = Act::none;
  if (c.batch() == 0 || c.outputs() == 0) return;
  if (x->dtype == IRT_F32) return conv::resample_image<float>(*x, filter, steps[0], steps[1], c, status);
  if (x->dtype == IRT_BF16) return conv::resample_image<bf16>(*x, filter, steps[0], steps[1], c, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace

IRT_CPU_KERNEL(upfirdn2d)

}  // namespace irt::INPAINTRT_ISA
