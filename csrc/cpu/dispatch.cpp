// Which kernels exist, and at which ISA they run: decided once, from what was built, the CPU and INPAINTRT_CPU_ISA.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "inpaintrt/abi.h"
#include "registry.h"

// Bounds of the linker sections that kernel and plan files fill.
extern "C" {
extern const irt::KernelRecord* const __start_irt_kernels[] __attribute__((visibility("hidden")));
extern const irt::KernelRecord* const __stop_irt_kernels[] __attribute__((visibility("hidden")));
extern const irt::PlanRecord* const __start_irt_plans[] __attribute__((weak, visibility("hidden")));
extern const irt::PlanRecord* const __stop_irt_plans[] __attribute__((weak, visibility("hidden")));
}

namespace {

bool supported(const char* isa) {
  __builtin_cpu_init();
  if (!strcmp(isa, "scalar")) return true;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!strcmp(isa, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(isa, "avx512")) return avx512;
  if (!strcmp(isa, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
  return false;
}

bool built(const char* isa) {
  for (auto k = __start_irt_kernels; k != __stop_irt_kernels; ++k) {
    if (!strcmp((*k)->isa, isa)) return true;
  }
  return false;
}

constexpr const char* kIsas[] = {"avx512bf16", "avx512", "avx2", "scalar"};  // best first; each has all of the next

struct Choice {
  const char* isa = nullptr;
  char error[200] = "";

  Choice() {
    const char* forced = getenv("INPAINTRT_CPU_ISA");
    for (const char* name : kIsas) {
      if (forced && *forced && strcmp(forced, name)) continue;
      if (built(name) && supported(name)) {
        isa = name;
        return;
      }
    }
    snprintf(error, sizeof error, "INPAINTRT_CPU_ISA=%.40s: %s; accepted: scalar, avx2, avx512, avx512bf16",
             forced ? forced : "", "unknown, not in this build (INPAINTRT_ISAS), or not supported by this CPU");
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

// The kernel for the best instruction set up to the chosen one: sets that add nothing to an op have no kernel of it.
const irt::KernelRecord* find(const char* name) {
  bool reached = false;
  for (const char* isa : kIsas) {
    reached = reached || isa == irt_cpu_isa();
    for (auto k = __start_irt_kernels; name && reached && k != __stop_irt_kernels; ++k) {
      if (!strcmp((*k)->name, name) && !strcmp((*k)->isa, isa)) return *k;
    }
  }
  return nullptr;
}

}  // namespace

extern "C" {

int irt_abi_version(void) { return IRT_ABI_VERSION; }
const char* irt_cpu_isa(void) { return choice().isa; }
const char* irt_cpu_isa_error(void) { return choice().error; }

irt_kernel irt_cpu_find(const char* name) {
  const irt::KernelRecord* found = find(name);
  return found ? found->run : nullptr;
}

irt_chooser irt_cpu_chooser(const char* name) {
  const irt::KernelRecord* found = find(name);
  return found ? found->choose : nullptr;
}

irt_planner irt_plan_find(const char* name) {
  for (auto p = __start_irt_plans; name && p != __stop_irt_plans; ++p) {
    if (!strcmp((*p)->name, name)) return (*p)->plan;
  }
  return nullptr;
}

int irt_cpu_count(void) {
  int count = 0;
  while (irt_cpu_name(count)) ++count;
  return count;
}

const char* irt_cpu_name(int index) {
  if (index < 0) return nullptr;
  for (auto k = __start_irt_kernels; irt_cpu_isa() && k != __stop_irt_kernels; ++k) {
    if (find((*k)->name) == *k && index-- == 0) return (*k)->name;
  }
  return nullptr;
}

}  // extern "C"
