// A call of contextual_attention: its arguments, and where a cell of the matching grid lies in the images.
#pragma once

#include <cmath>
#include <initializer_list>

#include "inpaintrt/abi.h"
#include "kernel.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA::contextual {

// Both ops: contextual_attention, or contextual_attention_with_offsets.
void attend(const irt_call& call, bool with_offsets, irt_status& status);

struct Call {
  const irt_view *foreground, *background, *mask, *queries, *out;
  const irt_view* offsets;                          // or null
  int64_t batch, channels, height, width;           // of the grid of cells, half of the images
  int64_t stride;                                   // of the keys that the softmax sees
  bool propagate, aligned, sum, infinite, overlap;  // fuse_size 3, sampling tf, norm sum_eps, mask_mode neginf, divisor
  float scale, eps;
  int threads;
  int64_t cells() const { return height * width; }
};

// The row (or column) of an image of 2·count rows that cell i of the grid takes.
static inline int64_t source_index(int64_t i, int64_t count, bool aligned) {
  if (!aligned || count == 1) return 2 * i;
  const float step = static_cast<float>(2 * count - 1) / static_cast<float>(count - 1);
  volatile float at =
      static_cast<float>(i) * step;  // rounded by itself, as TensorFlow does; an FMA breaks ties otherwise
  return least(static_cast<int64_t>(std::floor(at + 0.5f)), 2 * count - 1);
}

// Whether element (b, 0, y, x) of a mask is other than 0 (−0 counts as 0, NaN does not).
static inline bool is_set(const irt_view& mask, int64_t b, int64_t y, int64_t x) {
  const int64_t at = (mask.sizes[0] == 1 ? 0 : b) * mask.strides[0] + y * mask.strides[2] + x * mask.strides[3];
  switch (mask.dtype) {
    case IRT_F32: return static_cast<const float*>(mask.data)[at] != 0;
    case IRT_F64: return static_cast<const double*>(mask.data)[at] != 0;
    case IRT_F16:
    case IRT_BF16: return (static_cast<const uint16_t*>(mask.data)[at] & 0x7fff) != 0;
    case IRT_I32: return static_cast<const int32_t*>(mask.data)[at] != 0;
    case IRT_I64: return static_cast<const int64_t*>(mask.data)[at] != 0;
    default: return static_cast<const uint8_t*>(mask.data)[at] != 0;
  }
}

// The arguments in schema order.
enum {
  kForeground,
  kBackground,
  kMask,
  kPatchSize,
  kStride,
  kRate,
  kFuseSize,
  kScale,
  kSampling,
  kNorm,
  kEps,
  kMaskMode,
  kDivisor,
  kQueries,
  kArguments
};

// One of two words; false for a third.
static inline bool choice(const irt_value& value, const char* no, const char* yes, bool& chosen) {
  if (value.kind != IRT_STRING) return false;
  chosen = !strcmp(value.s, yes);
  return chosen || !strcmp(value.s, no);
}

// Why the call is not one of this op, or null.
static inline const char* read(const irt_call& call, bool with_offsets, Call& c) {
  const irt_value* a = call.args;
  if (call.nargs != kArguments || call.nouts != (with_offsets ? 2 : 1)) return "wrong number of arguments or outputs";
  const auto tensor = [&](int i) { return a[i].kind == IRT_TENSOR ? a[i].tensors : nullptr; };
  c.foreground = tensor(kForeground), c.background = tensor(kBackground), c.out = &call.outs[0];
  c.mask = tensor(kMask), c.queries = tensor(kQueries), c.offsets = with_offsets ? &call.outs[1] : nullptr;
  if (!c.foreground || !c.background) return "foreground and background must be tensors";
  const irt_view& f = *c.foreground;
  for (const irt_view* view : {c.foreground, c.background, c.out}) {
    if (view->ndim != 4 || view->dtype != f.dtype || memcmp(view->sizes, f.sizes, 4 * sizeof(int64_t))) {
      return "foreground, background and the output must be 4-D tensors of one shape and dtype";
    }
  }
  if (f.sizes[1] < 1 || f.sizes[2] < 2 || f.sizes[3] < 2 || f.sizes[2] % 2 || f.sizes[3] % 2) {
    return "height and width must be even and not 0, channels at least 1";
  }
  c.batch = f.sizes[0], c.channels = f.sizes[1], c.height = f.sizes[2] / 2, c.width = f.sizes[3] / 2;
  for (const irt_view* view : {c.mask, c.queries}) {
    if (view && (view->ndim != 4 || (view->sizes[0] != 1 && view->sizes[0] != c.batch) || view->sizes[1] != 1 ||
                 view->sizes[2] != c.height || view->sizes[3] != c.width)) {
      return "mask and queries must be (1 or B, 1, h/2, w/2)";
    }
  }
  if (c.offsets && (c.offsets->dtype != IRT_I32 || c.offsets->ndim != 4 || c.offsets->sizes[0] != c.batch ||
                    c.offsets->sizes[1] != 2 || c.offsets->sizes[2] != c.height || c.offsets->sizes[3] != c.width)) {
    return "offsets must be int32 (B, 2, h/2, w/2)";
  }
  if (a[kStride].kind != IRT_INT || a[kStride].i < 1 || a[kFuseSize].kind != IRT_INT)
    return "stride must be at least 1";
  if (!is_number_or_none(a[kScale]) || !is_number_or_none(a[kEps])) return "softmax_scale and eps must be numbers";
  c.stride = a[kStride].i, c.propagate = a[kFuseSize].i == 3;
  c.scale = static_cast<float>(float_arg(a[kScale], 10.0)), c.eps = static_cast<float>(float_arg(a[kEps], 1e-4));
  if (!choice(a[kSampling], "stride", "tf", c.aligned) || !choice(a[kNorm], "max", "sum_eps", c.sum) ||
      !choice(a[kMaskMode], "zero", "neginf", c.infinite) || !choice(a[kDivisor], "const4", "overlap", c.overlap)) {
    return "unknown sampling, norm, mask_mode or divisor";
  }
  c.threads = call.threads < 1 ? 1 : call.threads;
  return nullptr;
}

// Whether the call has a kernel.
static inline bool covered(const irt_call& call) {
  const auto is = [&](int i, int64_t value) { return call.args[i].kind == IRT_INT && call.args[i].i == value; };
  return call.nargs == kArguments && is(kPatchSize, 3) && is(kRate, 2) &&
         (is(kFuseSize, 3) || is(kFuseSize, 1) || is(kFuseSize, 0));
}

}  // namespace irt::INPAINTRT_ISA::contextual
