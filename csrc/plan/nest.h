// How a flat index becomes offsets into strided tensors. Shared by launch plans (host C++) and kernels (nvcc and
// NVRTC), so it includes nothing and holds plain data.
#pragma once

#ifdef __CUDACC__
#define IRT_BOTH __host__ __device__ __forceinline__
#else
#define IRT_BOTH inline
#endif
// Loops that must be unrolled, so that registers may be indexed by them; and such that must not, whose bodies are long.
#ifdef __CUDA_ARCH__
#define IRT_UNROLL _Pragma("unroll")
#define IRT_ROLL _Pragma("unroll 1")
#else
#define IRT_UNROLL
#define IRT_ROLL
#endif

namespace irt {

// Division of 0 <= n < 2^31 by a number known when the launch is planned: one multiplication and a shift instead of
// some twenty instructions. 64-bit offsets are rare enough to divide plainly.
template <class Offset>
struct Divisor;

template <>
struct Divisor<int> {
  int value;
  unsigned magic, shift;

  IRT_BOTH static Divisor of(int value) {
    unsigned shift = 0;
    while (1ull << shift < static_cast<unsigned long long>(value)) ++shift;
    const unsigned long long excess = (1ull << shift) - static_cast<unsigned>(value);
    return {value, static_cast<unsigned>((excess << 32) / static_cast<unsigned>(value) + 1), shift};
  }
  IRT_BOTH int quotient(int n) const {
    const unsigned whole = static_cast<unsigned>(n);
    const unsigned high = static_cast<unsigned>(static_cast<unsigned long long>(magic) * whole >> 32);
    return static_cast<int>((high + whole) >> shift);
  }
};

template <>
struct Divisor<long long> {
  long long value;

  IRT_BOTH static Divisor of(long long value) { return {value}; }
  IRT_BOTH long long quotient(long long n) const { return n / value; }
};

// A loop nest over kOperands tensors; dimension 0 is the innermost. `Offset` is int, or long long where int is too
// small.
template <class Offset, int kOperands>
struct Nest {
  static constexpr int kMaxRank = 4;
  int rank;  // >= 1
  Divisor<Offset> sizes[kMaxRank];
  Offset strides[kOperands][kMaxRank];  // elements

  IRT_BOTH void locate(Offset index, Offset (&at)[kOperands]) const {
    IRT_UNROLL
    for (int k = 0; k < kOperands; ++k) at[k] = 0;
    IRT_UNROLL  // so that no array is indexed at run time, which would put it into local memory
    for (int d = 0; d < kMaxRank; ++d) {
      Offset here = index;
      if (d + 1 < rank) {
        index = sizes[d].quotient(index);
        here -= index * sizes[d].value;
      }
      IRT_UNROLL
      for (int k = 0; k < kOperands; ++k) at[k] += here * strides[k][d];
      if (d + 1 == rank) return;
    }
  }
};

}  // namespace irt
