// What a CPU kernel file includes: registration, argument access, dtype dispatch.
//
// Every file in csrc/cpu that holds kernels is compiled once per ISA with INPAINTRT_ISA set to its name. Two traps
// decide the shape of this header. (1) Code that runs at load time must not be compiled with AVX flags, so kernels
// register through constant-initialised records in a linker section instead of static constructors. (2) An inline
// function with external linkage, compiled under different flags, would be merged by the linker into whichever copy
// came first; hence everything here lives in the ISA's own namespace.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "inpaintrt/abi.h"
#include "registry.h"

#define IRT_STRING2(x) #x
#define IRT_STRING(x) IRT_STRING2(x)

// Registers `void name(const irt_call&, irt_status&)` under its own name for the ISA being compiled.
#define IRT_CPU_KERNEL(name)                                                                         \
  static void name##_entry(const irt_call* call, irt_status* status) { name(*call, *status); }       \
  static const ::irt::KernelRecord name##_record = {#name, IRT_STRING(INPAINTRT_ISA), name##_entry}; \
  __attribute__((section("irt_kernels"), used)) static const ::irt::KernelRecord* const name##_listed = &name##_record;

namespace irt::INPAINTRT_ISA {

static inline void fail(irt_status& status, irt_code code, const char* message) {
  status.code = code;
  snprintf(status.message, sizeof status.message, "%s", message);
}

// The view of a tensor argument, or null with a status when it is absent or of another kind.
static inline const irt_view* tensor_arg(const irt_call& call, int index, irt_status& status) {
  if (index < call.nargs && call.args[index].kind == IRT_TENSOR) return call.args[index].tensors;
  snprintf(status.message, sizeof status.message, "argument %d must be a tensor", index);
  status.code = IRT_BAD_ARGUMENT;
  return nullptr;
}

static inline double float_arg(const irt_value& v, double absent) {
  return v.kind == IRT_FLOAT ? v.f : v.kind == IRT_INT ? static_cast<double>(v.i) : absent;
}

}  // namespace irt::INPAINTRT_ISA
