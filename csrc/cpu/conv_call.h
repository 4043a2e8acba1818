// How the convolution ops' arguments become a `Call`, and why some do not.
#pragma once

#include <initializer_list>

#include "conv.h"
#include "kernel.h"

namespace irt::INPAINTRT_ISA::conv {

static inline const irt_view* optional(const irt_value& value) {
  return value.kind == IRT_TENSOR ? value.tensors : nullptr;
}
static inline bool is(const irt_value& value, const char* text) {
  return value.kind == IRT_STRING && !strcmp(value.s, text);
}

static inline const char* read_image(const irt_value& value, Call& c) {
  c.x = optional(value), c.parts = 1;
  return c.x && c.x->ndim == 4 ? nullptr : "x must be a 4-D tensor";
}

// Two tensors as one, side by side along the channels.
static inline const char* join(const irt_view (&parts)[2], Call& c) {
  c.x = parts, c.parts = 2;
  if (parts[1].ndim != 4 || parts[1].dtype != parts[0].dtype) return "the parts of x must be 4-D tensors of one dtype";
  for (const int d : {0, 2, 3}) {
    if (parts[1].sizes[d] != parts[0].sizes[d]) return "the parts of x must have one size";
  }
  constexpr int64_t kWhole = 2 * W;  // bf16 lanes hold two channels
  return parts[0].sizes[1] % kWhole ? "the first part of x must fill whole blocks of channels" : nullptr;
}

static inline bool is_parameter(const irt_view& view, const Call& c) {
  return view.dtype == c.x->dtype || (c.wide && c.x->dtype == IRT_BF16 && view.dtype == IRT_F32);
}

static inline const char* read_weight(const irt_value& value, Call& c) {
  c.weight = optional(value);
  if (!c.weight || c.weight->ndim != 4 || !is_parameter(*c.weight, c)) return "weight must be 4-D, of x's dtype";
  for (int d = 0; d < 4; ++d) {
    if (c.weight->sizes[d] < 1) return "weight must not be empty";
  }
  if (most(c.weight->sizes[2], c.weight->sizes[3]) > kLongestKernel) return "the kernel is longer than 64";
  return nullptr;
}

// The second part's weights, of the same kernel.
static inline const char* read_rest(const irt_value& value, Call& c) {
  c.rest = optional(value);
  if (!c.rest || c.parts != 2) return "a weight of a second part, but no second part of x";
  const int channels = c.transposed ? 0 : 1;
  bool fits = c.rest->ndim == 4 && c.rest->dtype == c.weight->dtype;
  for (int d = 0; fits && d < 4; ++d) {
    fits = c.rest->sizes[d] == (d == channels ? c.x[1].sizes[1] : c.weight->sizes[d]) && c.rest->sizes[d] > 0;
  }
  return fits && c.weight->sizes[channels] == c.x[0].sizes[1] ? nullptr : "two weights must fit the two parts of x";
}

// What is beside a call: a 1×1 convolution of tensors of the output's size. `b` is the one that `c` then points to.
static inline const char* read_beside(const irt_view* x, const irt_value& weight, Call& c, Call& b) {
  b = {};
  b.x = x, b.parts = 1, b.weight = optional(weight), b.out = c.out, b.stride = b.dilation = b.upsample = 1;
  if (!x || x->ndim != 4 || !b.weight || b.weight->ndim != 4) return "what is beside must be two 4-D tensors";
  const int64_t *size = x->sizes, *w = b.weight->sizes, outputs = c.weight->sizes[c.transposed ? 1 : 0];
  const int64_t channels = size[1];
  if (channels < 1 || w[0] != outputs || w[1] != channels || w[2] != 1 || w[3] != 1) {
    return "the weight beside must be (Cout, channels beside, 1, 1)";
  }
  if (x->dtype != c.x->dtype || !is_parameter(*b.weight, c)) return "what is beside must have x's dtype";
  for (const int d : {0, 2, 3}) {
    if (size[d] != c.out->sizes[d]) return "what is beside must have the output's size";
  }
  const int64_t side = c.weight->sizes[2];
  const bool covered = side == c.weight->sizes[3] && (side == 3 || (side == 5 && !c.ieee)) && c.stride == 1 &&
                       c.dilation <= 64 && c.upsample == 1 && !c.transposed;
  if (!covered) return "a 1×1 convolution is added beside 3×3 and 5×5 ones of stride 1";
  c.beside = &b;
  return nullptr;
}

// One number per output, or none.
static inline const char* read_vector(const irt_value& value, int64_t length, const Call& c, const irt_view*& view) {
  view = optional(value);
  const bool fits = !view || (view->ndim == 1 && is_parameter(*view, c) && view->sizes[0] == length);
  return fits ? nullptr : "bias, scale and shift must have one number of x's dtype for each output";
}

static inline const char* read_mask(const irt_value& value, Call& c) {
  c.mask = optional(value);
  if (!c.mask) return nullptr;
  const int64_t *m = c.mask->sizes, *x = c.x->sizes;
  const bool fits = c.mask->ndim == 4 && c.mask->dtype == c.x->dtype && (m[0] == 1 || m[0] == x[0]) &&
                    (m[1] == 1 || m[1] == c.inputs()) && m[2] == x[2] && m[3] == x[3];
  return fits ? nullptr : "mask must be (1 or B, 1 or Cin, H, W) of x's dtype";
}

static inline const char* read_geometry(const irt_value& stride, const irt_value& padding, const irt_value& dilation,
                                        Call& c) {
  if (stride.kind != IRT_INT || stride.i < 1 || stride.i > kLargestStride) return "stride must be 1 to 8";
  if (dilation.kind != IRT_INT || dilation.i < 1) return "dilation must be at least 1";
  if (padding.kind != IRT_INTS || padding.count != 4) return "padding must be (top, left, bottom, right)";
  if (dilation.i > int64_t{1} << 40) return "dilation is too large";
  c.stride = stride.i, c.dilation = dilation.i;
  c.top = padding.ints[0], c.left = padding.ints[1], c.bottom = padding.ints[2], c.right = padding.ints[3];
  return least(least(c.top, c.left), least(c.bottom, c.right)) < 0 ? "padding must not be negative" : nullptr;
}

static inline const char* read_mode(const irt_value& value, Call& c) {
  c.padding = is(value, "reflect") ? Padding::reflect : is(value, "replicate") ? Padding::replicate : Padding::zeros;
  return c.padding == Padding::zeros && !is(value, "zeros") ? "unknown padding mode" : nullptr;
}

static inline const char* read_activation(const irt_value& name, const irt_value& alpha, Call& c) {
  if (name.kind != IRT_STRING || !parse_activation(name.s, c.act)) return "unknown activation";
  if (!is_number_or_none(alpha)) return "alpha must be a number or none";
  c.alpha = static_cast<float>(float_arg(alpha, default_alpha(c.act)));
  return nullptr;
}

// Whether the sizes of image, weight and output belong together; the last thing to ask.
static inline const char* check_sizes(const Call& c, int64_t output_padding = 0) {
  int64_t inputs = 0;
  for (int i = 0; i < c.parts; ++i) inputs += c.x[i].sizes[1];
  const int64_t filters = c.weight->sizes[c.transposed ? 1 : 0];
  if (c.out->ndim != 4 || c.out->dtype != c.x->dtype) return "the output must be 4-D, of x's dtype";
  if (inputs != c.inputs() || filters != c.outputs() * (c.gated ? 2 : 1) || c.out->sizes[0] != c.x->sizes[0]) {
    return "channels or batch do not fit";
  }
  if (c.residual && (c.residual->ndim != 4 || c.residual->dtype != c.x->dtype ||
                     memcmp(c.residual->sizes, c.out->sizes, 4 * sizeof(int64_t)))) {
    return "residual must have the output's shape and dtype";
  }
  const int64_t pads[] = {c.top, c.left, c.bottom, c.right};
  for (int i = 0; i < 2; ++i) {
    constexpr int64_t kMost = int64_t{1} << 40;
    const int64_t size = c.x->sizes[2 + i] * c.upsample, reach = c.dilation * (c.weight->sizes[2 + i] - 1);
    if (size < 1) return "the image must not be empty";
    if (pads[i] > kMost || pads[2 + i] > kMost || size > kMost || reach > kMost)
      return "padding or dilation is too large";
    if (c.padding == Padding::reflect && most(pads[i], pads[2 + i]) >= size) {
      return "reflection needs more rows and columns than padding";
    }
    const int64_t expected = c.transposed ? (size - 1) * c.stride - pads[i] - pads[2 + i] + reach + output_padding + 1
                                          : floor_div(size + pads[i] + pads[2 + i] - reach - 1, c.stride) + 1;
    if (expected < 1 || c.out->sizes[2 + i] != expected) return "the output's size does not fit";
  }
  return nullptr;
}

}  // namespace irt::INPAINTRT_ISA::conv
