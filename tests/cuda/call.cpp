// Loads the CUDA library as a C++ product would and calls some ops with host memory: `call LIBRARY`. Prints the
// library's description, then a status for each call. Only for machines without a driver, where nothing can be
// launched.
#include <dlfcn.h>

#include <cstdio>
#include <vector>

#include "inpaintrt/abi.h"

namespace {

irt_planner (*find_plan)(const char*);
irt_launcher (*find)(const char*);

irt_value tensor(const irt_view& view) {
  irt_value value = {};
  value.kind = IRT_TENSOR;
  value.tensors = &view;
  return value;
}
irt_value integer(int number) {
  irt_value value = {};
  value.kind = IRT_INT;
  value.i = number;
  return value;
}
irt_value text(const char* letters) {
  irt_value value = {};
  value.kind = IRT_STRING;
  value.s = letters;
  return value;
}
const irt_value none = {};

// Plans a call, provides the workspace, launches.
template <int count>
bool run(const char* op, const irt_value (&args)[count], const irt_view& out) {
  const irt_planner planner = find_plan(op);
  const irt_launcher launcher = find(op);
  if (!planner || !launcher) return false;
  irt_call call = {};
  call.args = args;
  call.nargs = count;
  call.outs = &out;
  call.nouts = 1;
  irt_plan plan;
  irt_status status;
  planner(&call, &plan, &status);
  if (status.code != IRT_OK) return false;
  std::vector<char> workspace(plan.workspace_bytes);
  launcher(&call, &plan, workspace.data(), &status);
  printf("%s %d %d %s\n", op, plan.count, status.code, status.message);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  const auto info = reinterpret_cast<const char* (*)()>(dlsym(library, "irt_cuda_info"));
  find_plan = reinterpret_cast<decltype(find_plan)>(dlsym(library, "irt_plan_find"));
  find = reinterpret_cast<decltype(find)>(dlsym(library, "irt_cuda_find"));
  if (!info || !find_plan || !find || find("no_such_op") || find_plan("no_such_op")) return 3;
  printf("%s\n", info());

  alignas(16) float x[8] = {}, out[8] = {}, weight[16] = {};
  irt_view input = {x, IRT_F32, 4, {1, 2, 2, 2}, {8, 4, 2, 1}}, half = {out, IRT_F32, 4, {1, 1, 2, 2}, {4, 4, 2, 1}};
  const irt_view whole = {out, IRT_F32, 4, {1, 2, 2, 2}, {8, 4, 2, 1}}, matrix = {weight, IRT_F32, 2, {4, 4}, {4, 1}};
  const irt_value gated[4] = {tensor(input), text("elu")};  // the rest is absent
  const irt_value fourier[4] = {tensor(input), tensor(matrix)};
  if (!run("gated_activation", gated, half) || !run("fourier_unit", fourier, whole)) return 4;
  if (!run("fourier_unit_unfused", fourier, whole)) return 4;
  const irt_value contextual[14] = {tensor(input), tensor(input), none,           integer(3), integer(1),
                                    integer(2),    integer(3),    none,           text("tf"), text("max"),
                                    none,          text("zero"),  text("const4"), none};
  if (!run("contextual_attention", contextual, whole)) return 4;

  input.sizes[0] = half.sizes[0] = 0;  // nothing to do needs no device
  return run("gated_activation", gated, half) ? 0 : 4;
}
