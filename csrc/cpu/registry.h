// Records by which kernels and launch plans make themselves known: pointers to constants in a linker
// section, no code at load time. (Pointers, because compilers may align structs more than the section's stride.)
#pragma once

#include "inpaintrt/abi.h"

namespace irt {
struct KernelRecord {
  const char* name;
  const char* isa;
  irt_kernel run;
  irt_chooser choose;  // null where the kernel has one algorithm
};
struct PlanRecord {
  const char* name;
  irt_planner plan;
};
}  // namespace irt
