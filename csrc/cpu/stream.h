// Stores past the cache, for results too large to be found there by who reads them.
#pragma once

#include "simd.h"

namespace irt::INPAINTRT_ISA {

// To an address that the vector's size divides. After the last one `end_stream`, before another thread may read.
template <class T>
static inline void stream(T* p, Vec x) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, x.v);
#else
    _mm256_stream_ps(p, x.v);
#endif
  } else {
    alignas(32) T some[Vec::kWidth];
    store(some, x);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(some)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(some)));
#endif
  }
#else
  store(p, x);
#endif
}
static inline void end_stream() { _mm_sfence(); }

}  // namespace irt::INPAINTRT_ISA
