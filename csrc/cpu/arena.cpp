#include "arena.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "inpaintrt/abi.h"

namespace irt {
namespace {

constexpr size_t kBlock = size_t{2} << 20;  // one huge page
constexpr size_t kMost = SIZE_MAX / 4;      // more than any address space has; sums of two such sizes do not overflow

struct Span {
  char* data;
  size_t bytes;
};

// What is taken is cut from the smallest free span that holds it; what comes back joins its neighbours. So a large span
// that nobody needs serves many small ones meanwhile. Where none holds it, it is made of the pages of several. So a
// chain of ops holds what it uses at once, whatever sizes it asks for, and needs no page of the system twice.
struct Arena {
  std::mutex mutex;
  std::vector<Span> free;  // by address, never touching each other
  size_t held = 0;         // mapped: in use or free
  size_t kept = 0;         // of these, free
  size_t peak = 0, limit = size_t{1} << 30;

  // mmap gives 4 KB alignment: over-allocate, then return the edges to the system.
  static char* map(size_t bytes) {
    void* raw = mmap(nullptr, bytes + kBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    const uintptr_t start = reinterpret_cast<uintptr_t>(raw), aligned = (start + kBlock - 1) / kBlock * kBlock;
    if (aligned > start) munmap(raw, aligned - start);
    if (const size_t tail = start + kBlock - aligned) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
    madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // advice: failure costs speed only
    return reinterpret_cast<char*>(aligned);
  }

  void* take(size_t& bytes) {
    if (bytes > kMost) return nullptr;
    bytes = std::max<size_t>((bytes + kBlock - 1) / kBlock * kBlock, kBlock);
    const std::lock_guard<std::mutex> lock(mutex);
    char* data = cut(bytes);
    if (!data) {
      data = map(bytes);
      if (!data && kept) {
        shed(0);
        data = map(bytes);
      }
      if (!data) return nullptr;
      held += bytes;
      fill(data, bytes);
      peak = std::max(peak, held);
    }
    return data;
  }

  void give(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const Span span{static_cast<char*>(data), bytes};
    auto next = std::lower_bound(free.begin(), free.end(), span, [](Span a, Span b) { return a.data < b.data; });
    try {
      next = free.insert(next, span);
    } catch (const std::bad_alloc&) {  // no room for the note that it is free
      return unmap(span);
    }
    kept += bytes;
    join(join(next));
    shed(limit);
  }

  // The others want the lock held.

  char* cut(size_t bytes) {
    auto best = free.end();
    for (auto at = free.begin(); at != free.end(); ++at)
      if (at->bytes >= bytes && (best == free.end() || at->bytes < best->bytes)) best = at;
    if (best == free.end()) return nullptr;
    char* const data = best->data;
    best->data += bytes;
    if (!(best->bytes -= bytes)) free.erase(best);
    kept -= bytes;
    return data;
  }

  // Moves free pages into new memory, of which no page exists yet. What cannot be moved is left where it is: the rest
  // of the memory gets pages of its own as it is written.
  void fill(char* data, size_t bytes) {
    for (char* const end = data + bytes; data < end && !free.empty(); data += kBlock) {
      Span& last = free.back();
      char* const block = last.data + (last.bytes - kBlock);
      if (mremap(block, kBlock, kBlock, MREMAP_MAYMOVE | MREMAP_FIXED, data) == MAP_FAILED) return;
      kept -= kBlock, held -= kBlock;
      if (!(last.bytes -= kBlock)) free.pop_back();
    }
  }

  // Joins a span to the one after it where they touch; returns the one before it.
  std::vector<Span>::iterator join(std::vector<Span>::iterator at) {
    if (const auto next = at + 1; next != free.end() && at->data + at->bytes == next->data) {
      at->bytes += next->bytes;
      free.erase(next);
    }
    return at == free.begin() ? at : at - 1;
  }

  // Unmaps free memory until at most this is kept, the largest spans first.
  void shed(size_t most) {
    while (kept > most) {
      const auto largest = std::max_element(free.begin(), free.end(), [](Span a, Span b) { return a.bytes < b.bytes; });
      const size_t excess = std::min(largest->bytes, (kept - most + kBlock - 1) / kBlock * kBlock);
      kept -= excess;
      unmap({largest->data + (largest->bytes - excess), excess});
      if (!(largest->bytes -= excess)) free.erase(largest);
    }
  }

  void unmap(Span span) {
    munmap(span.data, span.bytes);
    held -= span.bytes;
  }
};

Arena& arena() {
  static Arena* const instance = [] {
    // A child of fork has this thread only: the lock must not be held, then, by one that is gone.
    pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
    alignas(Arena) static char storage[sizeof(Arena)];
    return new (storage) Arena;  // never destroyed: kernels may still run in other threads at exit
  }();
  return *instance;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), bytes_(bytes) { data_ = arena().take(bytes_); }
Workspace::~Workspace() {
  if (data_) arena().give(data_, bytes_);
}

}  // namespace irt

extern "C" {
int64_t irt_arena_bytes(void) {
  const std::lock_guard<std::mutex> lock(irt::arena().mutex);
  return static_cast<int64_t>(irt::arena().held);
}
int64_t irt_arena_peak_bytes(void) {
  const std::lock_guard<std::mutex> lock(irt::arena().mutex);
  return static_cast<int64_t>(irt::arena().peak);
}
void irt_arena_set_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(irt::arena().mutex);
  irt::arena().limit = static_cast<size_t>(std::max<int64_t>(bytes, 0));
  irt::arena().shed(irt::arena().limit);
}
void* irt_arena_take(int64_t* bytes) {
  if (*bytes < 0) return nullptr;
  size_t size = static_cast<size_t>(*bytes);
  void* const block = irt::arena().take(size);
  if (block) *bytes = static_cast<int64_t>(size);
  return block;
}
void irt_arena_give(void* block, int64_t bytes) {
  if (block) irt::arena().give(block, static_cast<size_t>(bytes));
}
void irt_empty_cache(void) {
  const std::lock_guard<std::mutex> lock(irt::arena().mutex);
  irt::arena().shed(0);
}
}
