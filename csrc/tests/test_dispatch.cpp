// Which instruction set is chosen, and what is found under a name. Has its own main: here an unknown set is no skip.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "inpaintrt/abi.h"

namespace {
int failures = 0;

void expect(bool truth, const char* what) {
  if (truth) return;
  printf("failed: %s\n", what);
  ++failures;
}
}  // namespace

int main() {
  const char* forced = getenv("INPAINTRT_CPU_ISA");
  const bool known = !*forced || !strcmp(forced, "scalar") || !strcmp(forced, "avx2") || !strcmp(forced, "avx512") ||
                     !strcmp(forced, "avx512bf16");
  const char* isa = irt_cpu_isa();
  printf("INPAINTRT_CPU_ISA=%s: %s\n", forced, isa ? isa : irt_cpu_isa_error());
  if (known && !isa) return 77;

  expect(irt_cpu_isa() == isa, "the choice is made once");
  expect(irt_plan_find("gated_activation") != nullptr, "plans do not depend on the instruction set");
  expect(!irt_plan_find("gated") && !irt_plan_find("") && !irt_plan_find(nullptr), "no plan of that name");
  expect(!irt_cpu_find("gated") && !irt_cpu_find("") && !irt_cpu_find(nullptr), "no kernel of that name");
  expect(!irt_cpu_name(-1) && !irt_cpu_name(std::numeric_limits<int>::min()), "names end below 0");
  expect(!irt_cpu_name(irt_cpu_count()) && !irt_cpu_name(std::numeric_limits<int>::max()), "names end at the count");
  if (!known) {
    expect(!isa && strstr(irt_cpu_isa_error(), forced), "an unknown name is refused, and named");
    expect(irt_cpu_count() == 0 && !irt_cpu_find("gated_activation"), "nothing runs on an unknown instruction set");
    return failures ? 1 : 0;
  }
  expect(!*forced || !strcmp(isa, forced), "the forced instruction set is taken");
  expect(!*irt_cpu_isa_error(), "no error where there is a choice");
  for (int i = 0; i < irt_cpu_count(); ++i) {
    expect(irt_cpu_find(irt_cpu_name(i)) != nullptr, irt_cpu_name(i));
    for (int j = 0; j < i; ++j) expect(strcmp(irt_cpu_name(i), irt_cpu_name(j)), "a kernel is listed once");
  }
  expect(irt_cpu_find("gated_activation") && irt_cpu_find("gated_activation_backward"), "kernels are listed");
  return failures ? 1 : 0;
}
