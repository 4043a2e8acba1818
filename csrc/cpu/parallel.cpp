// Binding to the OpenMP runtime that the process already has, through the entry points every runtime exports
// (GNU's own ABI: libgomp defines it, LLVM's libomp and Intel's libiomp5 implement it).
#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "inpaintrt/abi.h"

namespace irt {
namespace {

constexpr size_t kPath = 4096;

// True in a child of fork whose OpenMP runtime is GNU's: the threads of its pool are not there, and it would wait for
// them. (LLVM's and Intel's start over by themselves.)
std::atomic<bool> orphaned{false};

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
    if (!(parallel && thread_index && team_size && nested)) {
      parallel = nullptr;
      return false;
    }
    snprintf(path, sizeof path, "%s", name);
    const bool gnu = !dlsym(handle, "__kmpc_fork_call");
    if (gnu) pthread_atfork(nullptr, nullptr, [] { orphaned = true; });
    return true;
  }
};

// Mapped libraries that have the name of an OpenMP runtime. Most processes have none or one; a few unrelated libraries
// begin with the same letters, so there is room for more.
struct Candidates {
  char paths[4][kPath];
  int count = 0;
};

int note_runtime(dl_phdr_info* info, size_t, void* result) {
  auto& found = *static_cast<Candidates*>(result);
  const char* slash = strrchr(info->dlpi_name, '/');
  const char* base = slash ? slash + 1 : info->dlpi_name;
  for (const char* stem : {"libgomp", "libiomp", "libomp"}) {
    if (strncmp(base, stem, strlen(stem)) == 0) {
      snprintf(found.paths[found.count++], kPath, "%s", info->dlpi_name);
      break;
    }
  }
  return found.count == 4;
}

OpenMP find() {
  OpenMP runtime;
  Candidates mapped;
  dl_iterate_phdr(note_runtime, &mapped);
  for (int i = 0; i < mapped.count; ++i) {
    if (runtime.bind(mapped.paths[i], RTLD_NOLOAD)) return runtime;
  }
  runtime.bind("libgomp.so.1", 0);  // a C++ program without torch; where there is none, loops are serial
  return runtime;
}

const OpenMP& openmp() {
  static const OpenMP runtime = find();
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
  const int64_t share = team.n / count, rest = team.n % count;  // the first `rest` pieces have one item more
  const int64_t begin = share * index + std::min(index, rest), end = begin + share + (index < rest);
  if (begin < end) team.body(team.context, begin, end);
}

}  // namespace

void parallel_ranges(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t pieces = std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1));
  if (pieces <= 1 || orphaned || !openmp().parallel || openmp().nested()) return body(context, 0, n);
  Team team{n, body, context};
  openmp().parallel(run_share, &team, static_cast<unsigned>(pieces), 0);
}

}  // namespace irt

extern "C" const char* irt_openmp_runtime(void) { return irt::openmp().parallel ? irt::openmp().path : ""; }
