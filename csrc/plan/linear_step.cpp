// Launch plan of linear_step.
#include "linear_step.h"

#include "step_plan.h"

namespace irt::plan {
namespace {

template <class Offset>
void fill(irt_launch& launch, const LinearCall& call, int64_t count) {
  static_assert(LinearStep<Offset>::kMostTerms == LinearCall::kMostTerms);
  const irt_view &out = *call.out, &table = *call.coefficients;
  LinearStep<Offset> p{};
  p.shape = step_shape<Offset>(out, count);
  for (int i = 0; i < call.count; ++i) p.terms[i] = step_image<Offset>(&call.terms[i], out);
  p.count = call.count;
  p.known = step_image<Offset>(call.known, out);
  p.mask = step_image<Offset>(call.mask, out);
  p.out = step_image<Offset>(call.out, out);
  p.noise = step_noise<Offset>(call, out);
  p.coefficients = static_cast<const float*>(table.data);
  p.coefficient_strides[0] = static_cast<Offset>(table.ndim == 2 ? table.strides[0] : 0);
  p.coefficient_strides[1] = static_cast<Offset>(table.strides[table.ndim - 1]);
  p.clip = call.clip;
  set_params(launch, p);
}

void planned(const irt_call& given, irt_plan& plan, irt_status& status, bool wide) {
  LinearCall call;
  if (!call.read(given, status)) return;
  const Storage type = storage(call.out->dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  const irt_view* views[LinearCall::kMostTerms + 6] = {call.out,   call.known, call.mask,
                                                       call.noise, call.seeds, call.coefficients};
  for (int i = 0; i < call.count; ++i) views[6 + i] = &call.terms[i];
  int64_t count;
  irt_launch* const launch = add_step(plan, *call.out, views, count, wide, status);
  if (!launch) return;
  (wide ? fill<long long> : fill<int>)(*launch, call, count);
  snprintf(launch->entry, sizeof launch->entry, "irt::linear_step<%s, %s>", type.name, wide ? "long long" : "int");
}

void linear_step(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, false); }

// The same with 64-bit offsets whatever the size, for tests.
void linear_step_wide(const irt_call& call, irt_plan& plan, irt_status& status) { planned(call, plan, status, true); }

}  // namespace

IRT_PLAN(linear_step)
IRT_PLAN(linear_step_wide)

}  // namespace irt::plan
