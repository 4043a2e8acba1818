// From a view to the launch that takes the moments of its planes.
#pragma once

#include <utility>

#include "moments.h"
#include "plan.h"

namespace irt::plan {

static inline int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Channels that blocks take side by side in an image of this layout.
static inline int side_by_side(const irt_view& image) {
  const int64_t *n = image.sizes, *s = image.strides, pixel = n[3] > 1 ? s[3] : n[2] > 1 ? s[2] : 1;
  const int64_t least = n[3] > 1 && n[2] > 1 && s[2] < pixel ? s[2] : pixel;
  return n[1] > 1 && s[1] < least ? PlaneMoments::kChannels : 1;
}

// The moments of an image that is not empty, whose channels begin at `first` of `all`; false, with a status, where it
// is too large.
static inline bool measure(irt_plan& plan, const irt_view& image, const char* type, int side, int64_t first,
                           int64_t all, int64_t parts_at, PlaneMoments& p, irt_status& status) {
  const int64_t batch = image.sizes[0], channels = image.sizes[1], pixels = image.sizes[2] * image.sizes[3];
  int64_t rows = image.sizes[2], width = image.sizes[3], row = image.strides[2], pixel = image.strides[3];
  if (width == 1 || (rows > 1 && row < pixel)) std::swap(rows, width), std::swap(row, pixel);
  const int block_pixels = PlaneMoments::pixels_of_block(side);
  const int64_t tiles = up(pixels, block_pixels), blocks = batch * up(channels, side) * tiles;
  if (pixels > kNarrow - block_pixels || blocks > kMaxBlocks || batch * all > kMaxBlocks / tiles) {
    fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
    return false;
  }
  p.data = image.data;
  const int64_t strides[] = {image.strides[0], image.strides[1], row, pixel};
  for (int d = 0; d < 4; ++d) p.strides[d] = strides[d];
  p.channels = static_cast<int>(channels);
  p.pixels = static_cast<int>(pixels);
  p.tiles = static_cast<int>(tiles);
  p.first = static_cast<int>(first);
  p.all = static_cast<int>(all);
  p.width = Divisor<int>::of(static_cast<int>(rows == 1 || row == pixel * width ? pixels : width));
  p.parts_at = parts_at;
  irt_launch* const launch = add_launch(plan, blocks * PlaneMoments::kThreads, PlaneMoments::kThreads, status);
  if (!launch) return false;
  launch->shared_bytes = sizeof(PlaneMoments::TileMemory);
  snprintf(launch->entry, sizeof launch->entry, "irt::plane_moments<%s, %d>", type, side);
  set_params(*launch, p);
  return true;
}

// Whether packs of n elements lie at addresses that their size divides, in all operands but the lines, which are the
// last operand; those are a pack's own, or one for all of it.
template <int kOperands>
bool packs_with_lines(const Loop<kOperands>& loop, int n) {
  constexpr int kLine = kOperands - 1;
  const int last = loop.ndim - 1;
  if (loop.sizes[last] % n || loop.strides[kLine][last] > 1) return false;
  for (int k = 0; k < kLine; ++k) {
    if (loop.strides[k][last] != 1) return false;
    for (int d = 0; d < last; ++d) {
      if (loop.strides[k][d] % n) return false;
    }
  }
  return true;
}

}  // namespace irt::plan
