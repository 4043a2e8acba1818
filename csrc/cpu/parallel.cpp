// Binding to the OpenMP runtime that the process already has, through the entry points every runtime exports
// (GNU's own ABI: libgomp defines it, LLVM's libomp and Intel's libiomp5 implement it).
#include "parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "inpaintrt/abi.h"

namespace irt {
namespace {

constexpr size_t kPath = 1024;

struct OpenMP {
  char path[kPath] = "";
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_index)() = nullptr;
  int (*team_size)() = nullptr;
  int (*nested)() = nullptr;

  bool bind(const char* name, int flags) {
    void* handle = dlopen(name, flags | RTLD_LAZY);
    if (!handle) return false;
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(handle, "GOMP_parallel"));
    thread_index = reinterpret_cast<decltype(thread_index)>(dlsym(handle, "omp_get_thread_num"));
    team_size = reinterpret_cast<decltype(team_size)>(dlsym(handle, "omp_get_num_threads"));
    nested = reinterpret_cast<decltype(nested)>(dlsym(handle, "omp_in_parallel"));
    if (!(parallel && thread_index && team_size && nested)) return false;
    snprintf(path, sizeof path, "%s", name);
    return true;
  }
};

int find_runtime(dl_phdr_info* info, size_t, void* result) {
  const char* slash = strrchr(info->dlpi_name, '/');
  const char* base = slash ? slash + 1 : info->dlpi_name;
  for (const char* stem : {"libgomp", "libiomp", "libomp"}) {
    if (strncmp(base, stem, strlen(stem)) == 0) {
      snprintf(static_cast<char*>(result), kPath, "%s", info->dlpi_name);
      return 1;
    }
  }
  return 0;
}

const OpenMP& openmp() {
  static OpenMP runtime;
  static std::once_flag once;
  std::call_once(once, [] {
    char mapped[kPath] = "";
    dl_iterate_phdr(find_runtime, mapped);
    if (mapped[0] && runtime.bind(mapped, RTLD_NOLOAD)) return;
    if (!mapped[0] && runtime.bind("libgomp.so.1", 0)) return;  // a C++ program without torch
    runtime.parallel = nullptr;
  });
  return runtime;
}

struct Team {
  int64_t n;
  void (*body)(void*, int64_t, int64_t);
  void* context;
};

void run_share(void* data) {
  const Team& team = *static_cast<const Team*>(data);
  const int64_t count = openmp().team_size(), index = openmp().thread_index();
  const int64_t begin = team.n * index / count, end = team.n * (index + 1) / count;
  if (begin < end) team.body(team.context, begin, end);
}

}  // namespace

void parallel_ranges(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t pieces = std::min<int64_t>(threads, (n + grain - 1) / std::max<int64_t>(grain, 1));
  if (pieces <= 1 || !openmp().parallel || openmp().nested()) return body(context, 0, n);
  Team team{n, body, context};
  openmp().parallel(run_share, &team, static_cast<unsigned>(pieces), 0);
}

}  // namespace irt

extern "C" const char* irt_openmp_runtime(void) { return irt::openmp().parallel ? irt::openmp().path : ""; }
