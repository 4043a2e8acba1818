#include "preferences.h"

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>

#include "inpaintrt/abi.h"

namespace irt {
namespace {

std::atomic<bool> any{false};

struct Preferences {
  std::mutex mutex;
  std::unordered_map<std::string, std::string> algorithms;  // by key
};

Preferences& preferences() {
  static Preferences* const instance = [] {
    // As in arena.cpp: the lock must not be held, in a child of fork, by a thread that is gone.
    pthread_atfork([] { preferences().mutex.lock(); }, [] { preferences().mutex.unlock(); },
                   [] { preferences().mutex.unlock(); });
    alignas(Preferences) static char storage[sizeof(Preferences)];
    return new (storage) Preferences;  // never destroyed: kernels may still run in other threads at exit
  }();
  return *instance;
}

}  // namespace

bool any_preferences() { return any.load(std::memory_order_relaxed); }

bool preferred(const char* key, char (&algorithm)[kLongestAlgorithm + 1]) try {
  const std::string wanted(key);
  const std::lock_guard<std::mutex> lock(preferences().mutex);
  const auto found = preferences().algorithms.find(wanted);
  if (found == preferences().algorithms.end()) return false;
  memcpy(algorithm, found->second.c_str(), found->second.size() + 1);
  return true;
} catch (const std::bad_alloc&) {  // no room for the key: a kernel does without the preference
  return false;
}

}  // namespace irt

extern "C" int irt_cpu_prefer(const char* const* keys, const char* const* algorithms, int count) try {
  if (count < 0 || (count && (!keys || !algorithms))) return IRT_BAD_ARGUMENT;
  std::unordered_map<std::string, std::string> wanted;
  for (int i = 0; i < count; ++i) {
    if (!keys[i] || !algorithms[i]) return IRT_BAD_ARGUMENT;
    if (strlen(algorithms[i]) > irt::kLongestAlgorithm) return IRT_BAD_ARGUMENT;
    wanted[keys[i]] = algorithms[i];
  }
  {
    const std::lock_guard<std::mutex> lock(irt::preferences().mutex);
    irt::preferences().algorithms.swap(wanted);
    irt::any = count > 0;
  }
  return IRT_OK;  // what was preferred before is freed here, unlocked
} catch (const std::bad_alloc&) {
  return IRT_OUT_OF_MEMORY;
}
