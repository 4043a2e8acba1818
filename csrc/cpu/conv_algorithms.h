// The algorithms by which the engine computes a call, each in a file of its own, and what the planner asks of them.
#pragma once

#include "arena.h"
#include "conv.h"
#include "conv_phases.h"
#include "kernel.h"

namespace irt::INPAINTRT_ISA::conv {

void direct(const Call& call, irt_status& status);        // any call
void pointwise(const Call& call, irt_status& status);     // 1×1, stride 1, no padding
void planar(const Call& call, irt_status& status);        // few filters, stride 1
void columns(const Call& call, irt_status& status);       // any call that is not transposed; meant for few pixels
void winograd_f43(const Call& call, irt_status& status);  // 3×3, stride 1
void winograd_f23(const Call& call, irt_status& status);  // likewise, with the direct form's rounding error
void winograd_f25(const Call& call, irt_status& status);  // 5×5, stride 1
// Along rows only: filters 5 or 7 wide, of any height, stride 1, not dilated; meant for few channels.
void rows_f45(const Call& call, irt_status& status);
void rows_f27(const Call& call, irt_status& status);
// What has phases of stride 1 (Tiling::halves) with up to two taps a dimension: a stride of 2 or a transposed one with
// 3×3 or 4×4 filters, 3×3 on a doubled image. With up to three: 5×5 and 6×6.
void winograd_f42_phases(const Call& call, irt_status& status);
void winograd_f43_phases(const Call& call, irt_status& status);

constexpr int64_t kFewFilters = 6;

// Whether the direct form upsamples by phases; else it does so while reading. (Sums of bf16 filters are no bf16
// numbers.)
static inline bool phased(const Call& call) { return doubled_by_phases(call) && call.x->dtype == IRT_F32; }

// So many windows are computed together: what their columns hold stays below 8 MB.
static inline int64_t windows_at_once(const Call& call) {
  const int64_t weights = call.inputs() * call.kernel_height() * call.kernel_width();
  return most(1, least(32, (int64_t{1} << 21) / (weights * W))) * W;
}

// Tiles along one dimension of `size` outputs: for each residue modulo the dilation as many as cover it.
static inline int64_t tiles_along(int64_t size, int64_t dilation, int64_t outputs) {
  int64_t tiles = 0;
  for (int64_t r = 0; r < least(dilation, size); ++r) tiles += ceil_div(ceil_div(size - r, dilation), outputs);
  return tiles;
}

// The order of Winograd's algorithm (conv_winograd.cpp), for so many tiles of an image and values of each filter. It
// makes a difference to rounding by phases, and so depends on neither the batch nor the threads.
constexpr int64_t kTilesPerGroup = 128;
static inline bool goes_by_filters(const Call& call, int64_t tiles, int64_t values) {
  constexpr int64_t kFar = int64_t{1} << 22;  // floats: 16 MB
  return tiles <= kTilesPerGroup || values * call.inputs() * Filters(call).blocks * W > kFar;
}

// An implementation has a Geometry, which knows the size of the workspace.
template <class Implementation>
static inline void run_as(const Call& call, irt_status& status) {
  const typename Implementation::Geometry g(call);
  const size_t bytes = static_cast<size_t>(g.floats()) * sizeof(float);
  if (call.needed) {
    *call.needed = bytes;
    return;
  }
  if (call.space) return Implementation(call, g, call.space).run();
  const Workspace space(bytes);
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  Implementation(call, g, static_cast<float*>(space.data())).run();
}

template <template <class> class Implementation>
static inline void run_for_dtype(const Call& call, irt_status& status) {
  if (call.x->dtype == IRT_F32) return run_as<Implementation<float>>(call, status);
  if (call.x->dtype == IRT_BF16) return run_as<Implementation<bf16>>(call, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace irt::INPAINTRT_ISA::conv
