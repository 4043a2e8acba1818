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

struct Block {
  void* data;
  size_t bytes;
};

struct Arena {
  std::mutex mutex;
  std::vector<Block> free;  // sorted by size
  size_t held = 0, peak = 0, kept = 0, limit = size_t{1} << 30;

  // mmap gives 4 KB alignment: over-allocate, then return the edges to the system.
  static void* map(size_t bytes) {
    void* raw = mmap(nullptr, bytes + kBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    const uintptr_t start = reinterpret_cast<uintptr_t>(raw), aligned = (start + kBlock - 1) / kBlock * kBlock;
    if (aligned > start) munmap(raw, aligned - start);
    if (const size_t tail = start + kBlock - aligned) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
    madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // advice: failure costs speed only
    return reinterpret_cast<void*>(aligned);
  }

  void* take(size_t& bytes) {
    if (bytes > kMost) return nullptr;
    bytes = std::max<size_t>((bytes + kBlock - 1) / kBlock * kBlock, kBlock);
    const std::lock_guard<std::mutex> lock(mutex);
    auto fit = std::lower_bound(free.begin(), free.end(), bytes, [](const Block& b, size_t n) { return b.bytes < n; });
    if (fit != free.end() && fit->bytes <= 2 * bytes) {  // a block twice too large is better kept for a larger need
      void* data = fit->data;
      bytes = fit->bytes;
      kept -= bytes;
      free.erase(fit);
      return data;
    }
    void* data = map(bytes);
    if (!data && kept) {  // what is kept for reuse stands in the way of what is needed now
      drop_above(0);
      data = map(bytes);
    }
    if (data) peak = std::max(peak, held += bytes);
    return data;
  }

  void give(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (bytes > limit || kept > limit - bytes) return drop({data, bytes});
    try {
      free.insert(
          std::lower_bound(free.begin(), free.end(), bytes, [](const Block& b, size_t n) { return b.bytes < n; }),
          {data, bytes});
    } catch (const std::bad_alloc&) {  // no room for the note that it is free
      return drop({data, bytes});
    }
    kept += bytes;
  }

  void drop(Block block) {
    munmap(block.data, block.bytes);
    held -= block.bytes;
  }

  // Unlocked, like `drop`.
  void drop_above(size_t bytes) {
    while (kept > bytes) {
      kept -= free.back().bytes;
      drop(free.back());
      free.pop_back();
    }
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
  irt::arena().drop_above(irt::arena().limit);
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
  irt::arena().drop_above(0);
}
}
