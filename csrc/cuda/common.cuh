// What every kernel file includes: storage types to float and back, and packs of elements moved by one instruction.
//
// Files named .cuh compile with nvcc (csrc/cuda/<op>.cu lists their instances) and with NVRTC (the cupy backend), so
// they include nothing but cuda_fp16.h, cuda_bf16.h and headers of this kind.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace irt {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// n neighbouring elements, loaded and stored at once: n is 1, or as many as 16 aligned bytes hold.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T values[n];
};

template <int n, class T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* at) {
  return *reinterpret_cast<const Pack<T, n>*>(at);
}
template <class T, int n>
__device__ __forceinline__ void store_pack(T* at, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(at) = pack;
}

}  // namespace irt
