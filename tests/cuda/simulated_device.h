// CUDA's execution model on the host: the blocks of a grid one after the other, the threads of a block as fibers that
// run in turn from barrier to barrier. It proves index arithmetic, barriers and numerics (with the host's elementary
// functions in place of the device's) without a GPU; it knows nothing of warps and of memory that takes its time.
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
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf point;  // where it goes on
  bool done;      // with this block
};
static std::vector<Fiber> fibers;
static Fiber* current;
static jmp_buf scheduler;
static const void* body;
static void (*call_body)(const void*);

inline void barrier() {
  if (!_setjmp(current->point)) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    call_body(body);
    current->done = true;
    barrier();
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

// One block; every thread calls `f`.
template <class F>
Outcome run_block(const F& f, bool reversed) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  body = &f;
  call_body = [](const void* any) { (*static_cast<const F*>(any))(); };
  if (fibers.size() != count) fibers = std::vector<Fiber>(count);
  for (Fiber& fiber : fibers) fiber.done = false;
  for (unsigned ended = 0; ended == 0;) {  // from barrier to barrier
    for (unsigned i = 0; i < count; ++i) {
      const unsigned t = reversed ? count - 1 - i : i;
      threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      resume(fibers[t]);
      ended += fibers[t].done;
    }
    if (ended != 0 && ended != count) {
      fibers.clear();  // some are in the middle of the kernel
      return kNotAllAtTheBarrier;
    }
  }
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

#define SIMULATE(...) \
  if (!strcmp(entry, #__VA_ARGS__)) return simulated::run(&__VA_ARGS__, *launch);
