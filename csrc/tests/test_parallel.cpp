// parallel_ranges on GNU's OpenMP runtime: coverage, the promises about pieces, nesting, callers at once, fork.
#include "parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "inpaintrt/abi.h"

extern "C" int ompl_version();

namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

struct Piece {
  int64_t begin, end;
  std::thread::id thread;
};

// The pieces of one call, in order.
std::vector<Piece> pieces(int64_t n, int64_t grain, int threads) {
  struct Log {
    std::mutex mutex;
    std::vector<Piece> found;
  } log;
  irt::parallel_ranges(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        auto& log = *static_cast<Log*>(context);
        const std::lock_guard<std::mutex> lock(log.mutex);
        size_t at = log.found.size();
        while (at > 0 && log.found[at - 1].begin > begin) --at;
        log.found.insert(log.found.begin() + static_cast<int64_t>(at), {begin, end, std::this_thread::get_id()});
      },
      &log);
  return log.found;
}

void the_runtime_is_found() {
  setenv("OMP_MAX_ACTIVE_LEVELS", "4",
         1);  // the runtime itself would allow nesting; read when it is loaded, just below
  CHECK(ompl_version() == 1, "the decoy is not linked");
  CHECK(strstr(irt_openmp_runtime(), "libgomp"), "bound to '%s'; this test needs libgomp.so.1", irt_openmp_runtime());
}

void every_index_is_covered_once() {
  for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{64}, int64_t{1001}, kMax}) {
    for (int64_t grain : {int64_t{-5}, int64_t{0}, int64_t{1}, int64_t{3}, int64_t{64}, int64_t{1000}, kMax}) {
      for (int threads : {-1, 0, 1, 2, 3, 5, 16}) {
        const std::vector<Piece> found = pieces(n, grain, threads);
        int64_t next = 0;
        for (const Piece& p : found) {
          CHECK(p.begin == next && p.end > p.begin, "n %lld grain %lld threads %d: piece [%lld, %lld) after %lld",
                static_cast<long long>(n), static_cast<long long>(grain), threads, static_cast<long long>(p.begin),
                static_cast<long long>(p.end), static_cast<long long>(next));
          CHECK(found.size() == 1 || p.end - p.begin >= grain, "a piece of %lld items, grain %lld",
                static_cast<long long>(p.end - p.begin), static_cast<long long>(grain));
          next = p.end;
        }
        CHECK(next == n, "%lld of %lld items", static_cast<long long>(next), static_cast<long long>(n));
        CHECK(static_cast<int>(found.size()) <= (threads > 1 ? threads : 1), "%zu pieces for %d threads", found.size(),
              threads);
      }
    }
  }
}

void it_is_parallel() {
  const std::vector<Piece> found = pieces(1000, 1, 3);
  CHECK(found.size() == 3, "%zu pieces", found.size());
  for (size_t i = 1; i < found.size(); ++i) {
    CHECK(found[i].thread != found[0].thread, "pieces 0 and %zu ran on one thread", i);
  }
}

void nested_calls_are_serial() {
  std::atomic<int> calls{0};
  irt::parallel_ranges(
      4, 1, 2,
      [](void* context, int64_t, int64_t) {
        const std::vector<Piece> inner = pieces(100, 1, 4);
        const bool serial = inner.size() == 1 && inner[0].thread == std::this_thread::get_id();
        CHECK(serial, "%zu pieces inside a parallel region", inner.size());
        ++*static_cast<std::atomic<int>*>(context);
      },
      &calls);
  CHECK(calls == 2, "%d pieces outside", calls.load());
}

void callers_may_come_from_several_threads() {
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&sum] {
      for (int i = 0; i < 50; ++i) {
        irt::parallel_ranges(
            100, 10, 3,
            [](void* context, int64_t begin, int64_t end) {
              int64_t part = 0;
              for (int64_t k = begin; k < end; ++k) part += k;
              *static_cast<std::atomic<int64_t>*>(context) += part;
            },
            &sum);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(sum == 4 * 50 * 4950, "sum %lld", static_cast<long long>(sum.load()));
}

// The pool's threads do not survive fork: a child that waited for them would hang.
void a_child_of_fork_is_serial() {
  CHECK(pieces(1000, 1, 3).size() == 3, "the parent has no pool to lose");
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const std::vector<Piece> found = pieces(1000, 1, 3);
    _exit(found.size() == 1 && found[0].end == 1000 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0, "the child ended with status %d", status);
  CHECK(pieces(1000, 1, 3).size() == 3, "the parent lost its pool");
}

}  // namespace

const check::Case check::cases[] = {
    {"the runtime is found, behind a decoy", the_runtime_is_found},
    {"every index is covered once", every_index_is_covered_once},
    {"it is parallel", it_is_parallel},
    {"nested calls are serial", nested_calls_are_serial},
    {"callers may come from several threads", callers_may_come_from_several_threads},
    {"a child of fork is serial", a_child_of_fork_is_serial},
    {nullptr, nullptr},
};
