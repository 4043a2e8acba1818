// parallel_ranges where there is no OpenMP runtime: nothing is mapped, and dlopen (wrapped by -Wl,--wrap=dlopen) fails.
#include <thread>

#include "check.h"
#include "inpaintrt/abi.h"
#include "parallel.h"

extern "C" void* __wrap_dlopen(const char*, int) { return nullptr; }

namespace {

void loops_run_on_the_calling_thread() {
  struct Seen {
    std::thread::id caller = std::this_thread::get_id();
    int calls = 0;
    bool good = true;
  } seen;
  irt::parallel_ranges(
      1000, 1, 8,
      [](void* context, int64_t begin, int64_t end) {
        auto& seen = *static_cast<Seen*>(context);
        ++seen.calls;
        seen.good = begin == 0 && end == 1000 && std::this_thread::get_id() == seen.caller;
      },
      &seen);
  CHECK(seen.calls == 1 && seen.good, "%d calls", seen.calls);
  CHECK(!*irt_openmp_runtime(), "bound to '%s'", irt_openmp_runtime());
}

}  // namespace

const check::Case check::cases[] = {
    {"loops run on the calling thread", loops_run_on_the_calling_thread},
    {nullptr, nullptr},
};
