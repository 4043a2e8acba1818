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
#define IRT_CPU_KERNEL(name) IRT_CPU_RECORD(name, nullptr)

// Likewise, with a `void choose(const irt_call&, irt_choice&, irt_status&)` that says by which of its algorithms.
#define IRT_CPU_KERNEL_OF_SEVERAL(name, choose)                                              \
  static void name##_chooser(const irt_call* call, irt_choice* choice, irt_status* status) { \
    *choice = irt_choice{};                                                                  \
    choice->chosen = -1;                                                                     \
    if (well_formed(*call, *status)) choose(*call, *choice, *status);                        \
  }                                                                                          \
  IRT_CPU_RECORD(name, name##_chooser)

#define IRT_CPU_RECORD(name, chooser)                                                                         \
  static void name##_entry(const irt_call* call, irt_status* status) {                                        \
    if (well_formed(*call, *status)) name(*call, *status);                                                    \
  }                                                                                                           \
  static const ::irt::KernelRecord name##_record = {#name, IRT_STRING(INPAINTRT_ISA), name##_entry, chooser}; \
  __attribute__((section("irt_kernels"), used)) static const ::irt::KernelRecord* const name##_listed = &name##_record;

namespace irt::INPAINTRT_ISA {

static inline void fail(irt_status& status, irt_code code, const char* message) {
  status.code = code;
  snprintf(status.message, sizeof status.message, "%s", message);
}

// ---- what holds for every call, checked before a kernel or a launch plan sees it -----------------------------------

// Why nobody may index this view, or null. Sizes and strides are bounded so that no index arithmetic on them overflows;
// whether the memory behind them is the caller's cannot be seen from here.
static inline const char* view_fault(const irt_view& view) {
  constexpr int64_t kMost = int64_t{1} << 60;
  if (view.dtype < IRT_F32 || view.dtype > IRT_BOOL) return "unknown dtype";
  if (view.ndim < 0 || view.ndim > IRT_MAX_DIMS) return "its rank is negative or above IRT_MAX_DIMS";
  int64_t elements = 1, bound = 1;
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t size = view.sizes[d];
    int64_t reach = 0;
    if (size < 0) return "negative size";
    if (__builtin_mul_overflow(bound, size > 1 ? size : 1, &bound) || bound > kMost) return "its sizes overflow";
    if (size > 1 && __builtin_mul_overflow(size - 1, view.strides[d], &reach)) return "its strides overflow";
    if (reach > kMost || reach < -kMost) return "its strides overflow";
    elements *= size;
  }
  return elements && !view.data ? "no data" : nullptr;  // an empty tensor's pointer may well be null
}

static inline const char* value_fault(const irt_value& value) {
  switch (value.kind) {
    case IRT_NONE:
    case IRT_INT:
    case IRT_FLOAT: return nullptr;
    case IRT_STRING: return value.s ? nullptr : "null string";
    case IRT_INTS: return value.count < 0 || (value.count && !value.ints) ? "null or negative list" : nullptr;
    case IRT_TENSOR:
    case IRT_TENSORS: break;
    default: return "unknown kind";
  }
  const int count = value.kind == IRT_TENSOR ? 1 : value.count;
  if (count < 0 || (count && !value.tensors)) return "null tensor, or null or negative list";
  for (int i = 0; i < count; ++i) {
    if (const char* fault = view_fault(value.tensors[i])) return fault;
  }
  return nullptr;
}

// Sets the status to OK; or to a fault of the call's form, and returns false.
static inline bool well_formed(const irt_call& call, irt_status& status) {
  status.code = IRT_OK;
  status.message[0] = 0;
  if (call.nargs < 0 || call.nouts < 0 || (call.nargs && !call.args) || (call.nouts && !call.outs)) {
    fail(status, IRT_BAD_ARGUMENT, "null or negative list of arguments or outputs");
    return false;
  }
  const char *fault = nullptr, *where = "argument";
  int at = 0;
  for (int i = 0; i < call.nargs && !fault; ++i) fault = value_fault(call.args[at = i]);
  if (!fault) where = "output";
  for (int i = 0; i < call.nouts && !fault; ++i) fault = view_fault(call.outs[at = i]);
  if (!fault) return true;
  status.code = IRT_BAD_ARGUMENT;
  snprintf(status.message, sizeof status.message, "%s %d: %s", where, at, fault);
  return false;
}

// ---- access to arguments -------------------------------------------------------------------------------------------

// The view of a tensor argument, or null with a status when it is absent or of another kind.
static inline const irt_view* tensor_arg(const irt_call& call, int index, irt_status& status) {
  if (index < call.nargs && call.args[index].kind == IRT_TENSOR) return call.args[index].tensors;
  snprintf(status.message, sizeof status.message, "argument %d must be a tensor", index);
  status.code = IRT_BAD_ARGUMENT;
  return nullptr;
}

static inline bool is_number_or_none(const irt_value& v) {
  return v.kind == IRT_NONE || v.kind == IRT_FLOAT || v.kind == IRT_INT;
}
static inline double float_arg(const irt_value& v, double absent) {
  return v.kind == IRT_FLOAT ? v.f : v.kind == IRT_INT ? static_cast<double>(v.i) : absent;
}

}  // namespace irt::INPAINTRT_ISA
