// From a plan to its launches: what csrc/cuda/<op>.cu includes to list its kernel instances and register its op.
//
// An instance is found by the C++ name that the plan gives it, the same name by which NVRTC compiles it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "inpaintrt/abi.h"
#include "registry.h"

namespace irt::cuda {

struct Instance {
  const char* entry;
  const void* kernel;
  uint32_t params_bytes;
  bool workspace, round;  // further parameters that it has
};

template <class Params>
Instance instance(const char* entry, void (*kernel)(Params)) {
  return {entry, reinterpret_cast<const void*>(kernel), sizeof(Params), false, false};
}
template <class Params>
Instance instance(const char* entry, void (*kernel)(Params, void*)) {
  return {entry, reinterpret_cast<const void*>(kernel), sizeof(Params), true, false};
}
template <class Params>
Instance instance(const char* entry, void (*kernel)(Params, void*, int)) {
  return {entry, reinterpret_cast<const void*>(kernel), sizeof(Params), true, true};
}

struct Record {
  const char* name;
  irt_launcher launch;
};

// What `irt_launcher` promises, with kernels from the op's list.
void launch(const Instance* instances, size_t count, const irt_call& call, const irt_plan& plan, void* workspace,
            irt_status& status);

}  // namespace irt::cuda

// An element of an instance list: the kernel, under its name as written.
#define IRT_INSTANCE(...) ::irt::cuda::instance(#__VA_ARGS__, &__VA_ARGS__)

// Registers op `name`, which launches what the plan of that name says from the array that `instances()` returns.
#define IRT_CUDA_KERNEL(name, instances)                                                                      \
  static void name##_entry(const irt_call* call, const irt_plan* plan, void* workspace, irt_status* status) { \
    const auto& list = instances();                                                                           \
    ::irt::cuda::launch(list, sizeof list / sizeof list[0], *call, *plan, workspace, *status);                \
  }                                                                                                           \
  static const ::irt::cuda::Record name##_record = {#name, name##_entry};                                     \
  __attribute__((section("irt_cuda_kernels"), used)) static const ::irt::cuda::Record* const name##_listed =  \
      &name##_record;
