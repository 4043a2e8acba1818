// The arguments of modulated_conv2d, and why some are not.
#pragma once

#include <cmath>

#include "conv_call.h"

namespace irt::INPAINTRT_ISA {

// (x, weight, style, demodulate, eps, weight_gain, up, down, padding, flip_weight, resample_filter | none, noise |
// none,
//  noise_strength | none, bias | none, activation, alpha, gain, clamp | none) -> out
namespace modulated {

enum {
  kX,
  kWeight,
  kStyle,
  kDemodulate,
  kEps,
  kWeightGain,
  kUp,
  kDown,
  kPadding,
  kFlipWeight,
  kFilter,
  kNoise,
  kStrength,
  kBias,
  kActivation,
  kAlpha,
  kGain,
  kClamp,
  kArguments
};

constexpr int64_t kLongestFir = 8;

struct Modulated {
  conv::Call call{};
  conv::Style style{};
  const irt_view* given = nullptr;  // the weight
  irt_view weight{}, one{};         // as the convolution reads it; the filter of a call without
  const irt_view *values, *noise, *strength, *filter;
  float tap = 1.0f;
  bool demodulate, flipped;
  float eps, weight_gain;
  int64_t up, down, padding;
  int64_t before[2], after[2];  // zeros of rows and columns around the enlarged image
};

static inline int64_t taps(const Modulated& m, int d) { return m.filter->sizes[d]; }

// Why the arguments are not those of this op, or null.
static inline const char* read(const irt_call& call, Modulated& m) {
  if (call.nargs != kArguments || call.nouts != 1) {
    return "expected the 18 arguments of modulated_conv2d and one output";
  }
  const irt_value* a = call.args;
  conv::Call& c = m.call;
  c.out = &call.outs[0], c.threads = call.threads, c.ieee = call.ieee, c.upsample = 1, c.dilation = 1, c.gain = 1.0f;
  if (const char* fault = conv::read_image(a[kX], c)) return fault;
  if (const char* fault = conv::read_weight(a[kWeight], c)) return fault;
  if (const char* fault = conv::read_vector(a[kBias], c.weight->sizes[0], c, c.bias)) return fault;
  if (const char* fault = conv::read_activation(a[kActivation], a[kAlpha], c)) return fault;
  for (const int i : {kDemodulate, kUp, kDown, kPadding, kFlipWeight}) {
    if (a[i].kind != IRT_INT) return "demodulate, up, down, padding and flip_weight must be integers";
  }
  for (const int i : {kEps, kWeightGain, kGain, kClamp}) {
    if (!is_number_or_none(a[i])) return "eps, weight_gain, gain and clamp must be numbers";
  }
  m.demodulate = a[kDemodulate].i != 0, m.flipped = a[kFlipWeight].i != 0;
  m.up = a[kUp].i, m.down = a[kDown].i, m.padding = a[kPadding].i;
  m.eps = static_cast<float>(float_arg(a[kEps], 1e-8));
  m.weight_gain = static_cast<float>(float_arg(a[kWeightGain], 1.0));
  if (m.up < 1 || m.up > 2 || m.down < 1 || m.down > 2 || m.up * m.down > 2) return "up and down must be 1 or 2";
  if (m.padding < 0 || m.padding > int64_t{1} << 28) return "padding must be 0 or more, and not that much";
  const irt_view &x = *c.x, &out = *c.out;
  const int64_t inputs = x.sizes[1];
  if (c.weight->sizes[1] != inputs || out.ndim != 4 || out.dtype != x.dtype || out.sizes[0] != x.sizes[0] ||
      out.sizes[1] != c.weight->sizes[0]) {
    return "channels, batch or dtype do not fit";
  }
  m.values = conv::optional(a[kStyle]);
  if (!m.values || m.values->ndim != 2 || m.values->dtype != x.dtype || m.values->sizes[0] != x.sizes[0] ||
      m.values->sizes[1] != inputs) {
    return "style must be (B, Cin) of x's dtype";
  }
  m.one.data = &m.tap, m.one.dtype = IRT_F32, m.one.ndim = 2, m.one.sizes[0] = m.one.sizes[1] = 1;
  m.filter = conv::optional(a[kFilter]);
  if (!m.filter) m.filter = &m.one;
  if (m.filter->ndim != 2 || m.filter->dtype != IRT_F32 || least(taps(m, 0), taps(m, 1)) < 1 ||
      most(taps(m, 0), taps(m, 1)) > kLongestFir) {
    return "resample_filter must be float32 (rows, columns), of 1 to 8 taps";
  }
  for (int d = 0; d < 2; ++d) {
    const int64_t n = taps(m, d), size = x.sizes[2 + d], kernel = c.weight->sizes[2 + d];
    if (size < 1 || size > int64_t{1} << 28) return "the image is empty or too large";
    m.before[d] = m.padding + (m.up > 1 ? (n + 1) / 2 : m.down > 1 ? (n - 1) / 2 : 0);
    m.after[d] = m.padding + (m.up > 1 ? (n - 2) / 2 : m.down > 1 ? (n - 2) / 2 : 0);
    if (n == 1) m.after[d] = m.padding + (m.up > 1 || m.down > 1 ? -1 : 0);
    const int64_t fir = m.up * m.down > 1 ? n - 1 : 0, whole = size * m.up + m.before[d] + m.after[d] - fir - kernel;
    if (whole < 0 || out.sizes[2 + d] != whole / m.down + 1) return "the output's size does not fit";
  }
  m.noise = conv::optional(a[kNoise]), m.strength = conv::optional(a[kStrength]);
  if (m.noise && (m.noise->ndim != 4 || m.noise->dtype != x.dtype || m.noise->sizes[1] != 1 ||
                  (m.noise->sizes[0] != 1 && m.noise->sizes[0] != x.sizes[0]) || m.noise->sizes[2] != out.sizes[2] ||
                  m.noise->sizes[3] != out.sizes[3])) {
    return "noise must be (1 or B, 1, H', W') of x's dtype";
  }
  if (m.strength && (!m.noise || m.strength->dtype != x.dtype || m.strength->ndim > 1 ||
                     (m.strength->ndim == 1 && m.strength->sizes[0] != 1))) {
    return "noise_strength must be one number of x's dtype, beside noise";
  }
  m.style.gain = static_cast<float>(float_arg(a[kGain], 1.0));
  m.style.clamp = static_cast<float>(float_arg(a[kClamp], INFINITY));
  m.style.planes = m.noise ? m.noise->sizes[0] : 1;
  m.given = c.weight, m.weight = *c.weight, c.weight = &m.weight, c.style = &m.style;
  return nullptr;
}

// The taps of each filter in the opposite order.
static inline void mirror(irt_view& weight, int32_t dtype) {
  int64_t last = 0;
  for (int d = 2; d < 4; ++d) {
    last += (weight.sizes[d] - 1) * weight.strides[d];
    weight.strides[d] = -weight.strides[d];
  }
  weight.data = static_cast<char*>(weight.data) + last * (dtype == IRT_F32 ? 4 : 2);
}

}  // namespace modulated
}  // namespace irt::INPAINTRT_ISA
