// nearest_code on the GPU: a matrix product whose sums become distances in registers, of which each vector keeps the
// least.
//
// Bound by arithmetic, 2·N·K·D flops, in float32 without tensor cores: TF32 would choose among near codes at random. A
// thread has 4×4 products; those of 16 numbers are summed by themselves, since long chains err by more than eager's.
// Of a dual codebook every vector meets both halves, but tiles that no vector of the block may choose from are left
// out.
#pragma once

#include "common.cuh"
#include "plan/nearest_code.h"
#include "plan/nest.h"

namespace irt {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

template <class T>
__device__ __forceinline__ bool in_first_half(const NearestCode& p, int vector) {
  if (!p.known) return true;
  const long long at = vector * p.known_stride;
  if (p.bytes) return static_cast<const unsigned char*>(p.known)[at] != 0;
  return to_float(static_cast<const T*>(p.known)[at]) != 0.0f;  // NaN is not 0 either
}

// Numbers [begin, begin + kEach) of the vector at `row`, 0 beyond the last, to column `line` of a tile; and their
// squares.
template <class T, int kLines>
__device__ __forceinline__ float loaded(const T* row, bool inside, long long step, int begin, int depth, int line,
                                        float (&tile)[NearestCode::kDepth][kLines], int first) {
  float squares = 0.0f;
  IRT_UNROLL
  for (int i = 0; i < NearestCode::kEach; ++i) {
    const int d = begin + first + i;
    const float value = inside && d < depth ? to_float(row[d * step]) : 0.0f;
    tile[first + i][line] = value;
    squares = fmaf(value, value, squares);
  }
  return squares;
}

template <class T>
__global__ void __launch_bounds__(NearestCode::kThreads, 2) nearest_code_search(const NearestCode p, void* workspace) {
  constexpr int kEach = NearestCode::kEach, kColumns = NearestCode::kCodes / kEach;
  constexpr unsigned kAll = 0xffffffffu;
  static_assert(NearestCode::kDepth == kEach * kEach && NearestCode::kThreads == NearestCode::kVectors * kEach);
  NearestCode::Memory& memory = *reinterpret_cast<NearestCode::Memory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x) % p.blocks;
  const int column = thread % kColumns * kEach, row = thread / kColumns * kEach;  // a thread's first code and vector
  const int line = thread / kEach, part = thread % kEach * kEach;                 // what it loads
  const int first = block * NearestCode::kVectors;
  const int begin = static_cast<int>(blockIdx.x) / p.blocks * p.chunk;
  const int end = p.codes - begin < p.chunk ? p.codes : begin + p.chunk;

  if (thread < NearestCode::kVectors) {
    memory.known[thread] = first + thread < p.vectors ? in_first_half<T>(p, first + thread) : -1;
  }
  __syncthreads();
  bool any_first = false, any_second = false;
  for (int i = 0; i < NearestCode::kVectors; ++i) {
    any_first |= memory.known[i] == 1;
    any_second |= memory.known[i] == 0;
  }
  float best[kEach];
  int at[kEach];
  bool own_half[kEach];
  IRT_UNROLL
  for (int v = 0; v < kEach; ++v) {
    own_half[v] = memory.known[row + v] != 0;
    best[v] = __int_as_float(0x7f800000);  // infinity: where nothing is nearer, the first code of the half stays
    at[v] = own_half[v] ? 0 : p.split;
  }

  const bool inside = first + line < p.vectors;
  const T* const x = static_cast<const T*>(p.x) + (first + line) * p.x_strides[0];
  for (int start = begin; start < end; start += NearestCode::kCodes) {
    if (!(start < p.split && any_first) && !(start + NearestCode::kCodes > p.split && any_second)) continue;
    const T* const code = static_cast<const T*>(p.codebook) + (start + line) * p.code_strides[0];
    float sums[kEach][kEach] = {}, x_squares = 0.0f, code_squares = 0.0f;
    for (int depth = 0; depth < p.depth; depth += NearestCode::kDepth) {
      x_squares += loaded(x, inside, p.x_strides[1], depth, p.depth, line, memory.x, part);
      code_squares += loaded(code, start + line < end, p.code_strides[1], depth, p.depth, line, memory.codes, part);
      __syncthreads();
      float products[kEach][kEach] = {};
      IRT_UNROLL
      for (int d = 0; d < NearestCode::kDepth; ++d) {
        const Pack<float, kEach> ours = load_pack<kEach>(&memory.x[d][row]);
        const Pack<float, kEach> theirs = load_pack<kEach>(&memory.codes[d][column]);
        IRT_UNROLL
        for (int v = 0; v < kEach; ++v) {
          IRT_UNROLL
          for (int k = 0; k < kEach; ++k) products[v][k] = fmaf(ours.values[v], theirs.values[k], products[v][k]);
        }
      }
      IRT_UNROLL
      for (int v = 0; v < kEach; ++v) {
        IRT_UNROLL
        for (int k = 0; k < kEach; ++k) sums[v][k] += products[v][k];
      }
      __syncthreads();
    }
    IRT_UNROLL
    for (int lanes = 1; lanes < kEach; lanes *= 2) {  // those that load one vector are neighbours
      x_squares += __shfl_xor_sync(kAll, x_squares, lanes);
      code_squares += __shfl_xor_sync(kAll, code_squares, lanes);
    }
    if (part == 0) memory.x_squares[line] = x_squares, memory.code_squares[line] = code_squares;
    __syncthreads();
    IRT_UNROLL
    for (int k = 0; k < kEach; ++k) {
      const int number = start + column + k;
      IRT_UNROLL
      for (int v = 0; v < kEach; ++v) {
        const float size = memory.x_squares[row + v] + memory.code_squares[column + k];
        float distance = fmaf(-2.0f, sums[v][k], size);
        if (distance != distance) distance = __int_as_float(static_cast<int>(0xff800000));  // NaN comes before all
        if (number < end && (number < p.split) == own_half[v] && distance < best[v]) best[v] = distance, at[v] = number;
      }
    }
  }

  IRT_UNROLL
  for (int v = 0; v < kEach; ++v) {
    IRT_UNROLL
    for (int lanes = 1; lanes < kColumns; lanes *= 2) {  // of equal codes the first
      const float other = __shfl_xor_sync(kAll, best[v], lanes);
      const int other_at = __shfl_xor_sync(kAll, at[v], lanes);
      if (other < best[v] || (other == best[v] && other_at < at[v])) best[v] = other, at[v] = other_at;
    }
    const long long chunk = static_cast<int>(blockIdx.x) / p.blocks;
    if (column == 0 && first + row + v < p.vectors) {
      static_cast<NearestCode::Found*>(workspace)[chunk * p.vectors + first + row + v] = {best[v], at[v]};
    }
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) nearest_code_first(const NearestCodeFirst p, void* workspace) {
  const long long vector = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= p.vectors) return;
  const NearestCode::Found* found = static_cast<const NearestCode::Found*>(workspace) + vector;
  NearestCode::Found best = *found;
  for (int chunk = 1; chunk < p.chunks; ++chunk) {
    found += p.vectors;
    if (found->distance < best.distance) best = *found;
  }
  p.out[vector] = best.code;
}

}  // namespace irt
