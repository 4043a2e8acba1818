// The workspace arena: alignment, reuse, its bounds, what happens when memory runs out, threads, fork.
//
// mmap and mremap are wrapped (-Wl,--wrap=…), so that the system can be made to refuse; operator new likewise.
#include "arena.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "inpaintrt/abi.h"

using irt::Workspace;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
int refused_maps = 0;   // as many of the next mmap calls fail
int moves_left = 1000;  // mremap calls that succeed
std::atomic<bool> refuse_new{false};

}  // namespace

extern "C" void* __real_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset);
extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
  if (refused_maps && refused_maps--) return MAP_FAILED;
  return __real_mmap(at, bytes, protection, flags, file, offset);
}

extern "C" void* __real_mremap(void* from, size_t bytes, size_t size, int flags, void* to);
extern "C" void* __wrap_mremap(void* from, size_t bytes, size_t size, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  void* const to = va_arg(rest, void*);
  va_end(rest);
  if (!moves_left) return MAP_FAILED;
  --moves_left;
  return __real_mremap(from, bytes, size, flags, to);
}

void* operator new(size_t bytes) {
  if (refuse_new) throw std::bad_alloc();
  if (void* data = malloc(bytes)) return data;
  throw std::bad_alloc();
}
void operator delete(void* data) noexcept { free(data); }
void operator delete(void* data, size_t) noexcept { free(data); }

namespace {

void fresh() {
  irt_arena_set_limit(1024 * kMiB);
  irt_empty_cache();
}

void blocks_are_aligned_and_usable() {
  fresh();
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{2} << 20, (size_t{2} << 20) + 1, size_t{7} << 20}) {
    const Workspace w(bytes);
    CHECK(w.data(), "no memory for %zu bytes", bytes);
    CHECK(reinterpret_cast<uintptr_t>(w.data()) % (2 * kMiB) == 0, "%p is not 2 MB-aligned", w.data());
    memset(w.data(), 0x5a, bytes);
    CHECK(irt_arena_bytes() % (2 * kMiB) == 0, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  }
  irt_empty_cache();
  CHECK(irt_arena_bytes() == 0, "%lld bytes held after empty_cache", static_cast<long long>(irt_arena_bytes()));
}

void blocks_are_reused() {
  fresh();
  void* first;
  {
    const Workspace w(5 * kMiB);
    first = w.data();
  }
  CHECK(irt_arena_bytes() == 6 * kMiB, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  {
    const Workspace w(6 * kMiB);  // rounded, the same size
    CHECK(w.data() == first, "a kept block of the right size was not reused");
    const Workspace other(6 * kMiB);
    CHECK(other.data() && other.data() != first, "one block was given out twice");
    CHECK(irt_arena_bytes() == 12 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  }
  fresh();
}

// A chain of ops with needs of many sizes holds the most that is used at once.
void large_blocks_are_cut_and_joined() {
  fresh();
  {
    const Workspace large(12 * kMiB);
  }
  {
    const Workspace a(2 * kMiB), b(6 * kMiB), c(4 * kMiB);
    CHECK(irt_arena_bytes() == 12 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
    const std::set<const void*> different{a.data(), b.data(), c.data()};
    CHECK(different.size() == 3, "a block was given out twice");
  }
  {
    std::optional<Workspace> a(2 * kMiB), b(4 * kMiB), c(6 * kMiB);
    b.reset();  // neighbours in use
    c.reset();  // joins what is before it
    const Workspace both(10 * kMiB);
    CHECK(irt_arena_bytes() == 12 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
    a.reset();
  }
  {
    std::optional<Workspace> a(2 * kMiB), b(4 * kMiB), c(6 * kMiB);
    c.reset();
    a.reset();
    b.reset();  // joins both sides
    const Workspace all(12 * kMiB);
    CHECK(irt_arena_bytes() == 12 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  }
  fresh();
}

void what_does_not_fit_is_not_hoarded() {
  fresh();
  for (int64_t size = 2; size <= 64; size += 2) {
    const Workspace growing(static_cast<size_t>(size * kMiB));
    CHECK(irt_arena_bytes() == size * kMiB, "%lld bytes held for %lld in use",
          static_cast<long long>(irt_arena_bytes()), static_cast<long long>(size * kMiB));
  }
  {
    const Workspace a(60 * kMiB), b(8 * kMiB);  // a fits, and b is made of what is left of the first and of new pages
    CHECK(irt_arena_bytes() == 68 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  }
  for (int again = 0; again < 3; ++again) {
    const Workspace a(60 * kMiB), b(8 * kMiB);
    CHECK(irt_arena_bytes() == 68 * kMiB, "a need that was met before took more memory");
  }
  fresh();
}

// Free spans apart from each other, between them one in use: 4, 6 (in use) and 2 MiB for a need of 6.
void pages_of_several_spans_become_one(int moves) {
  fresh();
  std::optional<Workspace> a(4 * kMiB), b(6 * kMiB), c(2 * kMiB);
  for (auto* w : {&a, &b, &c}) memset((*w)->data(), 0x11, kMiB);
  auto* const between = static_cast<unsigned char*>(b->data());
  memset(between, 0x5a, static_cast<size_t>(6 * kMiB));
  a.reset(), c.reset();
  {
    moves_left = moves;
    const Workspace whole(6 * kMiB);
    const int64_t fresh_blocks = 3 - (moves < 3 ? moves : 3);
    CHECK(whole.data(), "no memory");
    CHECK(irt_arena_bytes() == (12 + 2 * fresh_blocks) * kMiB, "%lld bytes held after %d moves",
          static_cast<long long>(irt_arena_bytes()), moves);
    memset(whole.data(), 0x77, static_cast<size_t>(6 * kMiB));
    for (int64_t i = 0; i < 6 * kMiB; i += 4096) CHECK(between[i] == 0x5a, "memory in use was moved");
  }
  moves_left = 1000;
  b.reset();
  irt_empty_cache();
  CHECK(irt_arena_bytes() == 0, "%lld bytes lost", static_cast<long long>(irt_arena_bytes()));
}

void free_pages_are_put_together() {
  pages_of_several_spans_become_one(1000);
  for (const int moves : {0, 1, 2}) pages_of_several_spans_become_one(moves);  // the system refuses the next one
}

void what_is_kept_is_bounded() {
  fresh();
  irt_arena_set_limit(8 * kMiB);
  {
    const Workspace a(6 * kMiB), b(4 * kMiB), c(2 * kMiB);
    CHECK(irt_arena_bytes() == 12 * kMiB, "a limit on what is kept held back %lld bytes in use",
          static_cast<long long>(irt_arena_bytes()));
  }
  CHECK(irt_arena_bytes() == 8 * kMiB, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  {
    const Workspace huge(64 * kMiB);
  }
  CHECK(irt_arena_bytes() == 8 * kMiB, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  irt_arena_set_limit(5 * kMiB);
  CHECK(irt_arena_bytes() == 4 * kMiB, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  irt_arena_set_limit(-1);
  CHECK(irt_arena_bytes() == 0, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  {
    const Workspace w(1);
  }
  CHECK(irt_arena_bytes() == 0, "%lld bytes kept with limit 0", static_cast<long long>(irt_arena_bytes()));
  fresh();
}

void peak_is_the_most_ever_held() {
  fresh();
  const int64_t before = irt_arena_peak_bytes();
  {
    const Workspace w(static_cast<size_t>(before + 10 * kMiB));
    CHECK(irt_arena_peak_bytes() == before + 10 * kMiB, "peak %lld", static_cast<long long>(irt_arena_peak_bytes()));
  }
  irt_empty_cache();
  CHECK(irt_arena_peak_bytes() == before + 10 * kMiB, "peak %lld", static_cast<long long>(irt_arena_peak_bytes()));
}

void sizes_that_overflow_are_refused() {
  fresh();
  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 4096, SIZE_MAX / 2, size_t{1} << 62}) {
    const Workspace w(bytes);
    CHECK(!w.data(), "%zu bytes were promised", bytes);
  }
  CHECK(irt_arena_bytes() == 0, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
}

void a_refusal_by_the_system_is_survived() {
  fresh();
  refused_maps = 1;
  {
    const Workspace w(kMiB);
    CHECK(!w.data(), "memory out of nowhere");
  }
  CHECK(irt_arena_bytes() == 0, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  {
    const Workspace w(4 * kMiB);
  }
  refused_maps = 1;  // what is kept is given back before giving up
  const Workspace w(32 * kMiB);
  CHECK(w.data(), "4 MiB kept for reuse were in the way of a need");
  CHECK(irt_arena_bytes() == 32 * kMiB, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
}

// The list of kept blocks grows with `new`; a workspace ends in a destructor, which may not throw.
void a_failing_new_loses_nothing() {
  fresh();
  {
    std::optional<Workspace> many[64];  // more than the list has had room for so far
    for (auto& w : many) w.emplace(1);
    refuse_new = true;
    for (auto& w : many) w.reset();
    refuse_new = false;
  }
  const int64_t kept = irt_arena_bytes();
  CHECK(kept < 128 * kMiB, "nothing failed: the test proves nothing");
  irt_empty_cache();
  CHECK(irt_arena_bytes() == 0, "%lld bytes lost", static_cast<long long>(irt_arena_bytes()));
}

void many_threads_share_it() {
  fresh();
  irt_arena_set_limit(24 * kMiB);
  std::atomic<int> bad{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([t, &bad] {
      Random random{static_cast<uint64_t>(t)};
      for (int i = 0; i < 200; ++i) {
        const size_t bytes = static_cast<size_t>(random.between(1, 9 * kMiB));
        const Workspace w(bytes);
        auto* data = static_cast<unsigned char*>(w.data());
        if (!data) {
          ++bad;
          continue;
        }
        const auto mark = static_cast<unsigned char>(16 * t + i % 16);
        data[0] = data[bytes / 2] = data[bytes - 1] = mark;
        if (i % 16 == 0) irt_empty_cache();
        std::this_thread::yield();
        if (data[0] != mark || data[bytes / 2] != mark || data[bytes - 1] != mark) ++bad;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(bad == 0, "%d blocks were shared or missing", bad.load());
  CHECK(irt_arena_bytes() <= 24 * kMiB, "%lld bytes kept", static_cast<long long>(irt_arena_bytes()));
  fresh();
  CHECK(irt_arena_bytes() == 0, "%lld bytes lost", static_cast<long long>(irt_arena_bytes()));
}

// While other threads hold the lock again and again, children must find it free.
void a_child_of_fork_can_use_it() {
  fresh();
  std::atomic<bool> stop{false};
  std::thread other([&stop] {
    while (!stop) {
      const Workspace w(1);
    }
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a deadlock ends as a signal
      const Workspace w(kMiB);
      if (w.data()) memset(w.data(), 1, kMiB);
      _exit(w.data() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "child %d ended with status %d", i, status);
  }
  stop = true;
  other.join();
}

}  // namespace

const check::Case check::cases[] = {
    {"blocks are aligned and usable", blocks_are_aligned_and_usable},
    {"blocks are reused", blocks_are_reused},
    {"large blocks are cut and joined", large_blocks_are_cut_and_joined},
    {"what does not fit is not hoarded", what_does_not_fit_is_not_hoarded},
    {"free pages are put together", free_pages_are_put_together},
    {"what is kept is bounded", what_is_kept_is_bounded},
    {"peak is the most ever held", peak_is_the_most_ever_held},
    {"sizes that overflow are refused", sizes_that_overflow_are_refused},
    {"a refusal by the system is survived", a_refusal_by_the_system_is_survived},
    {"a failing new loses nothing", a_failing_new_loses_nothing},
    {"many threads share it", many_threads_share_it},
    {"a child of fork can use it", a_child_of_fork_can_use_it},
    {nullptr, nullptr},
};
