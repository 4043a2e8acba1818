// From the arguments of an op on windows to `Windows`. For launch plans.
#pragma once

#include "plan.h"
#include "windows.h"

namespace irt::plan {

// Whether windows of this size and shift divide the map (B, H, W, …).
static inline bool divide(const irt_view& map, const irt_value& size, const irt_value& shift) {
  if (map.ndim != 4 || size.kind != IRT_INT || shift.kind != IRT_INT || size.i < 1) return false;
  for (int d = 1; d < 3; ++d) {
    if (map.sizes[d] <= 0 || map.sizes[d] % size.i) return false;
  }
  return shift.i >= 0 && shift.i < size.i;
}

// How many there are; −1, with a status, where kernels could not count tokens, rows or windows.
static inline int64_t windows(const irt_view& map, const irt_value& size, const irt_value& shift, Windows& out,
                              irt_status& status) {
  constexpr int64_t kMostRows = kNarrow / 2;
  if (size.i > 4096) {
    fail(status, IRT_UNSUPPORTED, "a window must have at most 4096 rows");
    return -1;
  }
  const int64_t height = map.sizes[1], width = map.sizes[2];
  const int64_t down = height / size.i, across = width / size.i, count = map.sizes[0] * down * across;
  if (height > kMostRows || width > kMostRows || count > kMaxBlocks) {
    fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
    return -1;
  }
  out.height = static_cast<int>(height);
  out.width = static_cast<int>(width);
  out.shift = static_cast<int>(shift.i);
  out.size = Divisor<int>::of(static_cast<int>(size.i));
  out.down = Divisor<int>::of(static_cast<int>(down));
  out.across = Divisor<int>::of(static_cast<int>(across));
  return count;
}

}  // namespace irt::plan
