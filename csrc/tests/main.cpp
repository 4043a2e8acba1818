// Runs the cases of one test file. Exit status: 0, 1 after a failed check, 77 where this CPU lacks the instruction set.
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>

#include "check.h"
#include "inpaintrt/abi.h"

namespace {
std::atomic<int> failures{0};
}

void check::fail(const char* file, int line, const char* format, ...) {
  if (++failures > 20) return;  // the first ones tell
  printf("  %s:%d: ", file, line);
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
}

void check::note(const char* format, ...) {
  printf("  ");
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
}

int main() {
  if (!irt_cpu_isa()) {
    printf("skipped: %s\n", irt_cpu_isa_error());
    return 77;
  }
  printf("ISA %s\n", irt_cpu_isa());
  for (const check::Case* c = check::cases; c->name; ++c) {
    const int before = failures;
    const auto start = std::chrono::steady_clock::now();
    printf("%s\n", c->name);
    fflush(stdout);  // so that a crash has a name
    c->run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    printf("  %s, %.2f s\n", failures == before ? "ok" : "FAILED", seconds.count());
  }
  if (failures) printf("%d checks failed\n", failures.load());
  return failures ? 1 : 0;
}
