// A parallel loop on the process's one OpenMP pool.
//
// The library is not linked against an OpenMP runtime: at first use it binds to the one that is already mapped
// (torch's), whatever its file is called, because a second pool would spin against the first. See parallel.cpp.
#pragma once

#include <cstdint>

namespace irt {
// Calls body(context, begin, end) over [0, n) in at most `threads` contiguous pieces of at least `grain` items; in one
// piece inside another parallel region, and in a child of fork where the runtime's threads do not exist. The body must
// not throw.
void parallel_ranges(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);
}  // namespace irt

#ifdef INPAINTRT_ISA
namespace irt::INPAINTRT_ISA {
template <class Body>
static inline void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  parallel_ranges(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}
}  // namespace irt::INPAINTRT_ISA
#endif
