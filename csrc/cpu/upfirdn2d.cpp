// upfirdn2d on the CPU. Bound by memory: a pixel is read as often as the filter has rows, from a near cache.
#include "resample_image.h"
#include "upfirdn2d_call.h"

namespace irt::INPAINTRT_ISA {
namespace {

void upfirdn2d(const irt_call& call, irt_status& status) {
  UpfirdnCall given;
  if (const char* fault = given.read(call)) return fail(status, IRT_BAD_ARGUMENT, fault);
  for (int d = 0; d < 2; ++d) {
    if (given.filter->sizes[d] > kLongestFilter)
      return fail(status, IRT_BAD_ARGUMENT, "f must have 1 to 16 taps on a side");
    if (most(given.up[d], given.down[d]) > kLargestFactor)
      return fail(status, IRT_BAD_ARGUMENT, "up and down must be 1 to 8");
  }
  Resampling filter;
  filter.up_x = given.up[0], filter.up_y = given.up[1];
  filter.left = given.padding[0], filter.top = given.padding[2];
  filter.set(*given.filter, given.gain, given.correlates);
  conv::Call c{};
  c.out = given.out, c.threads = call.threads, c.act = Act::none;
  if (c.batch() == 0 || c.outputs() == 0) return;
  const irt_view& x = *given.x;
  if (x.dtype == IRT_F32) return conv::resample_image<float>(x, filter, given.down[0], given.down[1], c, status);
  if (x.dtype == IRT_BF16) return conv::resample_image<bf16>(x, filter, given.down[0], given.down[1], c, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace

IRT_CPU_KERNEL(upfirdn2d)

}  // namespace irt::INPAINTRT_ISA
