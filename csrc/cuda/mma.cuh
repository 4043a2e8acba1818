// Products of small matrices by a warp's tensor cores, and copies into shared memory that pass no register. What a GPU
// does in one instruction here, tests/cuda/simulated_device.h does for tests without one.
#pragma once

#include "common.cuh"

namespace irt {

#ifndef IRT_SIMULATED

// sum += A · B of 16 × K and K × 8 elements, K being 32 bytes long: 16 halves or 8 floats of TF32, whose other bits are
// cut off. Lane 4 · g + t of a warp holds, in words (w elements of one word are neighbours along K),
//
//   a[0], a[1]  rows g and g + 8 at word t        b[0]  column g at word t
//   a[2], a[3]  rows g and g + 8 at word t + 4    b[1]  column g at word t + 4
//   sum[0], sum[1]  row g, columns 2 · t and 2 · t + 1        sum[2], sum[3]  row g + 8, the same columns
//
// (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "… mma.m16n8k8".)
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 × 8 halves in shared memory, of which lane 8 · i + r names row r of matrix i, 16 aligned bytes.
// Word i of the result are rows 2 · t and 2 · t + 1 of column g of matrix i, for lane 4 · g + t: where rows lie along
// K, what a product takes for b.
__device__ __forceinline__ void load_columns(unsigned (&words)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// Begins to copy 4, 8 or 16 bytes, aligned as their number, of device memory into shared memory.
template <int kBytes = 16>
__device__ __forceinline__ void copy_later(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
}
// Waits for the thread's own copies. Others see them after the next barrier.
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

// x rounded to nearest in TF32, ties away from 0. NaN and infinities stay.
__device__ __forceinline__ float to_tf32(float x) {
  return x != x ? x : __int_as_float((__float_as_int(x) + 0x1000) & ~0x1fff);
}

}  // namespace irt
