// Loads the CUDA library as a C++ product would and calls gated_activation with host memory: `call LIBRARY`. Prints the
// library's description, then the status. Only for machines without a driver, where nothing can be launched.
#include <dlfcn.h>

#include <cstdio>

#include "inpaintrt/abi.h"

int main(int argc, char** argv) {
  void* library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  const auto find = reinterpret_cast<irt_kernel (*)(const char*)>(dlsym(library, "irt_cuda_find"));
  const auto info = reinterpret_cast<const char* (*)()>(dlsym(library, "irt_cuda_info"));
  if (!find || !info || find("no_such_op")) return 3;
  const irt_kernel kernel = find("gated_activation");
  if (!kernel) return 4;

  alignas(16) float y[8] = {}, out[4] = {};
  const irt_view input = {y, IRT_F32, 4, {1, 2, 2, 2}, {8, 4, 2, 1}};
  irt_view output = {out, IRT_F32, 4, {1, 1, 2, 2}, {4, 4, 2, 1}};
  irt_value args[4] = {};
  args[0].kind = IRT_TENSOR;
  args[0].tensors = &input;
  args[1].kind = IRT_STRING;
  args[1].s = "elu";
  irt_call call = {};
  call.args = args;
  call.nargs = 4;
  call.outs = &output;
  call.nouts = 1;
  irt_status status = {};
  kernel(&call, &status);
  printf("%s\n%d %s\n", info(), status.code, status.message);

  output.sizes[0] = 0;  // nothing to do needs no device
  irt_view none = input;
  none.sizes[0] = 0;
  args[0].tensors = &none;
  status = {};
  kernel(&call, &status);
  printf("%d %s\n", status.code, status.message);
  return 0;
}
