// Launch plan of sampler_step.
#include "sampler_step.h"

#include "step_plan.h"

namespace irt::plan {
namespace {

template <class Offset>
void fill(irt_launch& launch, const SamplerCall& call, int64_t count) {
  const irt_view &x = *call.x, &row = *call.row;
  SamplerStep<Offset> p{};
  p.shape = step_shape<Offset>(x, count);
  p.x = step_image<Offset>(call.x, x);
  p.model = step_image<Offset>(call.model, x);
  p.known = step_image<Offset>(call.known, x);
  p.mask = step_image<Offset>(call.mask, x);
  p.guidance = step_image<Offset>(call.guidance, x);
  p.next = step_image<Offset>(call.next, x);
  p.clean = step_image<Offset>(call.clean, x);
  p.variances = static_cast<Offset>(x.sizes[1] * call.model->strides[1]);
  p.noise = step_noise<Offset>(call, x);
  p.row = static_cast<const float*>(row.data);
  p.row_strides[0] = static_cast<Offset>(row.ndim == 2 ? row.strides[0] : 0);
  p.row_strides[1] = static_cast<Offset>(row.strides[row.ndim - 1]);
  p.prediction = static_cast<int>(call.prediction);
  p.variance = static_cast<int>(call.variance);
  p.clip = call.clip;
  set_params(launch, p);
}

void planned(const irt_call& given, irt_plan& plan, irt_status& status, bool wide) {
  SamplerCall call;
  if (!call.read(given, status)) return;
  const Storage type = storage(call.model->dtype);
  if (!type.per_vector) {
    return fail(status, IRT_UNSUPPORTED, "model_output must be float32, bfloat16 or float16");
  }
  const irt_view* const views[] = {call.x,     call.model, call.known, call.mask, call.guidance,
                                   call.noise, call.seeds, call.row,   call.next, call.clean};
  int64_t count;
  irt_launch* const launch = add_step(plan, *call.x, views, count, wide, status);
  if (!launch) return;
  (wide ? fill<long long> : fill<int>)(*launch, call, count);
  snprintf(launch->entry, sizeof launch->entry, "irt::sampler_step<%s, %s>", type.name, wide ? "long long" : "int");
}

void sampler_step(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, false); }

// The same with 64-bit offsets whatever the size, for tests.
void sampler_step_wide(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, true); }

}  // namespace

IRT_PLAN(sampler_step)
IRT_PLAN(sampler_step_wide)

}  // namespace irt::plan
