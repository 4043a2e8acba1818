// Launch plan of upfirdn2d.
#include "upfirdn2d.h"

#include "resample_plan.h"

#include "upfirdn2d_call.h"

namespace irt::plan {
namespace {

void upfirdn2d(const irt_call& call, irt_plan& plan, irt_status& status) {
  UpfirdnCall c;
  if (const char* fault = c.read(call)) return fail(status, IRT_BAD_ARGUMENT, fault);
  if (!storage(c.out->dtype).per_vector) {
    return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
  if (c.out->sizes[0] == 0 || c.out->sizes[1] == 0) return;  // no launches: nothing to do
  Resample p{};
  p.factor = c.gain, p.gain = 1.0f, p.bound = INFINITY, p.act = static_cast<int>(Act::none);
  const Steps steps = {{c.up[1], c.up[0]}, {c.down[1], c.down[0]}, {c.padding[2], c.padding[0]}};
  if (!resampled(*c.x, *c.out, c.filter, c.correlates, steps, p, status)) return;
  add_resample("upfirdn2d", *c.x, *c.out, p, plan, status);
}

}  // namespace

IRT_PLAN(upfirdn2d)

}  // namespace irt::plan
