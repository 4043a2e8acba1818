// CUDA's execution model on the host, for kernels without barriers: every thread of every block, one after the other.
// It proves index arithmetic and numerics (with the host's elementary functions in place of the device's) without a
// GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __expf expf
static inline float __fdividef(float a, float b) { return a / b; }

struct Index {
  unsigned x, y, z;
};
static Index blockIdx, threadIdx;

template <class Params>
int run(void (*kernel)(Params), const unsigned* grid, const unsigned* block, const void* bytes, unsigned count) {
  Params params;
  if (count != sizeof params) return 2;
  memcpy(static_cast<void*>(&params), bytes, sizeof params);
  for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block[2]; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block[1]; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block[0]; ++threadIdx.x) kernel(params);
  return 0;
}

#define SIMULATE(...) \
  if (!strcmp(entry, #__VA_ARGS__)) return run(&__VA_ARGS__, grid, block, params, bytes);
