// CUDA's execution model on the host: the blocks of a grid one after the other, the threads of a block as fibers that
// run in turn: those of a warp from barrier to barrier, the warps one after the other from one of the block's to the
// next. It proves index arithmetic, barriers and numerics (with the host's elementary functions in place of the
// device's) without a GPU; it knows nothing of memory that takes its time. Of warps it knows their products of small
// matrices, from fragments that lie as PTX says, and their exchanges; all threads of the warp take part in one.
//
// Shared memory holds NaN before each block, and may not be written beyond what the launch asked for. A barrier that is
// missing makes results depend on the order of the threads, which may be reversed.
#pragma once

#undef _FORTIFY_SOURCE  // which takes a jump from stack to stack for an error
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define __expf expf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * static_cast<double>(x);
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}

struct Index {
  unsigned x, y, z;
};
static Index gridDim, blockDim, blockIdx, threadIdx;

namespace irt {
alignas(256) inline unsigned char memory[228 * 1024];  // the block's dynamic shared memory, by the name kernels give it
}

namespace simulated {

enum Outcome { kRan = 0, kNoSuchKernel, kOtherParameters, kNotAllAtTheBarrier, kSharedMemoryOverrun };

struct Launch {
  unsigned grid[3], block[3], shared_bytes, params_bytes;
  const void* params;
  void* workspace;
  int round;     // -1: the kernel has no such parameter
  int reversed;  // the last thread first
};

// A thread: it calls `body` for a block, and once more for each block after that. Switching is setjmp and longjmp,
// which unlike swapcontext make no system call; a context serves to get onto the stack.
enum class At { kWarp, kBlock, kEnd };  // where a thread waits: at a barrier of its warp or of the block; done with it
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf point;  // where it goes on
  At at;
};
static std::vector<Fiber> fibers;
static Fiber* current;
static jmp_buf scheduler;
static const void* body;
static void (*call_body)(const void*);

inline void wait(At at) {
  current->at = at;
  if (!_setjmp(current->point)) _longjmp(scheduler, 1);
}
inline void barrier() { wait(At::kBlock); }
inline void warp_barrier() { wait(At::kWarp); }

inline void fiber_main() {
  for (;;) {
    call_body(body);
    wait(At::kEnd);
  }
}

inline void resume(Fiber& fiber) {
  constexpr size_t kStack = 64 * 1024;
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.point, 1);
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// A warp's threads, to a barrier of the block or their end; false where they are not all at the same one.
inline bool run_warp(unsigned first, unsigned count, bool reversed) {
  for (;;) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = first + (reversed ? count - 1 - i : i);
      threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      resume(fibers[t]);
    }
    for (unsigned i = 1; i < count; ++i) {
      if (fibers[first + i].at != fibers[first].at) return false;
    }
    if (fibers[first].at != At::kWarp) return true;
  }
}

// One block; every thread calls `f`.
template <class F>
Outcome run_block(const F& f, bool reversed) {
  constexpr unsigned kWarp = 32;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z, warps = (count + kWarp - 1) / kWarp;
  body = &f;
  call_body = [](const void* any) { (*static_cast<const F*>(any))(); };
  if (fibers.size() != count) fibers = std::vector<Fiber>(count);
  do {  // from barrier to barrier
    bool together = true;
    for (unsigned i = 0; i < warps && together; ++i) {
      const unsigned first = kWarp * (reversed ? warps - 1 - i : i), left = count - first;
      together = run_warp(first, left < kWarp ? left : kWarp, reversed);
    }
    for (const Fiber& fiber : fibers) together = together && fiber.at == fibers[0].at;
    if (!together) {
      fibers.clear();  // some are in the middle of the kernel
      return kNotAllAtTheBarrier;
    }
  } while (fibers[0].at != At::kEnd);
  return kRan;
}

template <class F>
Outcome run_grid(const F& f, const Launch& launch) {
  constexpr unsigned char kNan = 0xff;
  constexpr size_t kWatched = 4096;  // behind the shared memory that was asked for
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  if (launch.shared_bytes + kWatched > sizeof irt::memory) return kSharedMemoryOverrun;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        memset(irt::memory, kNan, launch.shared_bytes + kWatched);
        const Outcome outcome = run_block(f, launch.reversed);
        if (outcome != kRan) return outcome;
        for (size_t i = 0; i < kWatched; ++i) {
          if (irt::memory[launch.shared_bytes + i] != kNan) return kSharedMemoryOverrun;
        }
      }
    }
  }
  return kRan;
}

template <class Params>
Outcome run(void (*kernel)(Params), const Launch& launch) {
  Params params;
  if (launch.params_bytes != sizeof params || launch.workspace || launch.round >= 0) return kOtherParameters;
  memcpy(static_cast<void*>(&params), launch.params, sizeof params);
  return run_grid([&] { kernel(params); }, launch);
}

template <class Params>
Outcome run(void (*kernel)(Params, void*), const Launch& launch) {
  Params params;
  if (launch.params_bytes != sizeof params || !launch.workspace || launch.round >= 0) return kOtherParameters;
  memcpy(static_cast<void*>(&params), launch.params, sizeof params);
  return run_grid([&] { kernel(params, launch.workspace); }, launch);
}

template <class Params>
Outcome run(void (*kernel)(Params, void*, int), const Launch& launch) {
  Params params;
  if (launch.params_bytes != sizeof params || !launch.workspace || launch.round < 0) return kOtherParameters;
  memcpy(static_cast<void*>(&params), launch.params, sizeof params);
  return run_grid([&] { kernel(params, launch.workspace, launch.round); }, launch);
}

}  // namespace simulated

#define __syncthreads simulated::barrier
#define __syncwarp simulated::warp_barrier

namespace simulated {

static float exchanged[2][1024];  // a thread may be one exchange ahead of another, not two
static unsigned exchanges[1024];

}  // namespace simulated

static inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  float (&all)[1024] = simulated::exchanged[simulated::exchanges[threadIdx.x]++ % 2];
  all[threadIdx.x] = value;
  simulated::warp_barrier();
  return all[threadIdx.x ^ static_cast<unsigned>(lanes)];
}
static inline int __shfl_xor_sync(unsigned all, int value, int lanes) {
  return __float_as_int(__shfl_xor_sync(all, __int_as_float(value), lanes));
}

// ---- csrc/cuda/mma.cuh --------------------------------------------------------------------------------------------

#define IRT_SIMULATED

namespace simulated {

inline float number(unsigned word, int, float) { return __int_as_float(static_cast<int>(word & ~0x1fffu)); }
inline float number(unsigned word, int which, __half) {
  __half value;
  memcpy(&value, reinterpret_cast<const char*>(&word) + 2 * which, sizeof value);
  return __half2float(value);
}
inline float number(unsigned word, int which, __nv_bfloat16) {
  __nv_bfloat16 value;
  memcpy(&value, reinterpret_cast<const char*>(&word) + 2 * which, sizeof value);
  return __bfloat162float(value);
}

// Every lane lays its fragments out and, when all have, takes those of the lanes that hold its rows and columns.
struct Fragments {
  unsigned a[4], b[2];
};
static Fragments fragments[2][1024];  // a thread may be one product ahead of another, not two
static unsigned products[1024];
static const void* rows[2][1024];
static unsigned row_loads[1024];

template <class T>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], T type) {
  const unsigned thread = threadIdx.x, warp = thread / 32 * 32, g = thread % 32 / 4, t = thread % 4;
  Fragments(&all)[1024] = fragments[products[thread]++ % 2];
  memcpy(all[thread].a, a, sizeof a);
  memcpy(all[thread].b, b, sizeof b);
  warp_barrier();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    double exact = static_cast<double>(sum[i]);
    for (unsigned word = 0; word < 8; ++word) {
      const unsigned left = all[warp + row % 8 * 4 + word % 4].a[row / 8 + word / 4 * 2];
      const unsigned right = all[warp + column * 4 + word % 4].b[word / 4];
      for (int which = 0; which < static_cast<int>(4 / sizeof(T)); ++which) {
        exact += static_cast<double>(number(left, which, type)) * static_cast<double>(number(right, which, type));
      }
    }
    sum[i] = static_cast<float>(exact);
  }
}

// Every lane names a row and, when all have, takes its columns out of those of its warp.
inline void load_columns(unsigned (&words)[4], const void* row) {
  const unsigned thread = threadIdx.x, warp = thread / 32 * 32, g = thread % 32 / 4, t = thread % 4;
  const void*(&all)[1024] = rows[row_loads[thread]++ % 2];
  all[thread] = row;
  warp_barrier();
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned half = 0; half < 2; ++half) {
      const char* const from = static_cast<const char*>(all[warp + 8 * i + 2 * t + half]);
      memcpy(reinterpret_cast<char*>(&words[i]) + 2 * half, from + 2 * g, 2);
    }
  }
}

// Copies that have begun arrive when they are waited for, not before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
static std::vector<Copy> copies[1024];

}  // namespace simulated

namespace irt {

template <class T>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], T type) {
  simulated::multiply_add(sum, a, b, type);
}
inline void load_columns(unsigned (&words)[4], const void* row) { simulated::load_columns(words, row); }
template <int kBytes = 16>
void copy_later(void* shared, const void* global) {
  simulated::copies[threadIdx.x].push_back({shared, global, kBytes});
}
inline void copies_done() {
  for (const simulated::Copy& copy : simulated::copies[threadIdx.x]) memcpy(copy.to, copy.from, copy.bytes);
  simulated::copies[threadIdx.x].clear();
}

}  // namespace irt

#define SIMULATE(...) \
  if (!strcmp(entry, #__VA_ARGS__)) return simulated::run(&__VA_ARGS__, *launch);
