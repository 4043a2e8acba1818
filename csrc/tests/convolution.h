// Calls of the convolution ops, with all that an op can be given, and the ops' definition as plain sums in double.
//
// A result comes with the magnitude that its rounding is in proportion to: what entered its sum, Σ|w||x|, and what was
// added and multiplied afterwards. Winograd's algorithm rounds combinations of a whole tile, so that there the sum's
// magnitude is that of norms, Σ_c ‖w_c‖₁ · max|x_c|. Bounds are in units of 2⁻²⁴ of it: what was measured in float32
// over all instruction sets and algorithms and several seeds, with half as much again.
#pragma once

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <string>

#include "tensors.h"

namespace {

constexpr double kDirectUnits = 1.3, kWinogradUnits = 8.7, kWinogradIeeeUnits = 0.75;

enum class Op { fused, gated, partial };
const char* const kOps[] = {"fused_conv2d", "gated_conv2d", "partial_conv2d"};
const char* const kActivations[] = {"none", "relu", "leaky_relu", "elu", "silu", "sigmoid", "tanh"};
const char* const kModes[] = {"zeros", "reflect", "replicate"};

enum class Residual { none, before, after };

// What a call is to be.
struct Setting {
  Op op = Op::fused;
  int dtype = IRT_F32;
  int64_t b = 1, inputs = 1, outputs = 1, h = 1, w = 1, kh = 1, kw = 1;  // outputs: of a gated op half of the filters
  int64_t first = 0;                                                     // channels of the first of two parts of x
  bool apart = false;                                                    // whether each part has a weight of its own
  int64_t beside = 0;                                                    // channels of a 1×1 convolution, or none
  int64_t stride = 1, dilation = 1, upsample = 1, output_padding = 0, pads[4] = {};  // top, left, bottom, right
  const char *mode = "zeros", *activation = "none";
  bool transposed = false, bias = false, scale = false, shift = false, ieee = false, window = true;
  bool wide = false;  // whether weights and vectors are float32 beside bf16 images
  Residual residual = Residual::none;
  int64_t mask_images = 0, mask_channels = 0;  // 0: no mask
  double alpha = NAN, gain = 1.0, eps = 1e-8;  // NaN: alpha is absent
  Memory memory = Memory::nchw, parameters = Memory::nchw, out_memory = Memory::nchw;

  int parameter() const { return wide ? int{IRT_F32} : dtype; }
  int64_t filters() const { return op == Op::gated ? 2 * outputs : outputs; }
  int64_t taps() const { return kh * kw; }
  int64_t out_size(int axis) const {
    const int64_t size = (axis ? w : h) * upsample, both = pads[axis] + pads[axis + 2];
    const int64_t reach = dilation * ((axis ? kw : kh) - 1);
    if (transposed) return (size - 1) * stride - both + reach + output_padding + 1;
    const int64_t room = size + both - reach - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
  // Whether the engine adds a 1×1 convolution to such a call.
  bool takes_beside() const {
    return op == Op::fused && kh == kw && (kh == 3 || (kh == 5 && !ieee)) && stride == 1 && upsample == 1 &&
           !transposed;
  }
  bool possible() const {
    const bool reflects = std::max(pads[0], pads[2]) < h * upsample && std::max(pads[1], pads[3]) < w * upsample;
    return out_size(0) > 0 && out_size(1) > 0 && (strcmp(mode, "reflect") != 0 || reflects);
  }
  void pad(int64_t all) { std::fill(pads, pads + 4, all); }
  // Whether the engine may take one of Winograd's forms.
  bool spreads() const {
    const bool plain = !transposed && stride == 1 && kh == kw && (kh == 3 || kh == 5);
    const bool rows = !transposed && stride == 1 && dilation == 1 && (kw == 5 || kw == 7);
    const auto taps = [&](int64_t side) { return stride == 2 ? (side + 1) / 2 : side / 2 + 1; };
    const bool two = (stride == 2 && upsample == 1) || (stride == 1 && upsample == 2);
    const bool phases = two && dilation == 1 && taps(kh) == taps(kw) && (taps(kh) == 2 || taps(kh) == 3);
    return plain || rows || phases;
  }
  std::string text() const {
    char line[400];
    const auto n = [](int64_t i) { return static_cast<long long>(i); };
    snprintf(
        line, sizeof line,
        "%s %s%s %lldx%lld+%lldx%lldx%lld to %lld, kernel %lldx%lld stride %lld dilation %lld pads %lld %lld %lld "
        "%lld %s%s%s +%lld up %lld %s beside %lld bias %d scale %d shift %d residual %d mask %lldx%lld memory %d %d %d",
        kOps[static_cast<int>(op)],
        dtype == IRT_F32 ? "f32"
        : wide           ? "bf16 by f32"
                         : "bf16",
        ieee ? " ieee" : "", n(b), n(first), n(inputs - first), n(h), n(w), n(outputs), n(kh), n(kw), n(stride),
        n(dilation), n(pads[0]), n(pads[1]), n(pads[2]), n(pads[3]), mode, transposed ? " transposed" : "",
        apart ? " apart" : "", n(output_padding), n(upsample), activation, n(beside), bias, scale, shift,
        static_cast<int>(residual), n(mask_images), n(mask_channels), static_cast<int>(memory),
        static_cast<int>(parameters), static_cast<int>(out_memory));
    return line;
  }
};

// Something of everything: small images, channels around the widths of vectors, and any options together.
inline Setting random_setting(Random& random, Op op) {
  constexpr int64_t kChannels[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 33};
  const auto coin = [&](int64_t of = 1) { return random.between(0, of) == 0; };
  for (;;) {
    Setting s;
    s.op = op, s.dtype = coin(2) ? IRT_BF16 : IRT_F32;
    s.b = random.between(1, 2), s.inputs = kChannels[random.between(0, 11)],
    s.outputs = kChannels[random.between(0, 11)];
    s.h = random.between(1, 9), s.w = random.between(1, coin(3) ? 24 : 9);
    s.kh = s.kw = random.between(1, 7);
    if (coin()) s.kw = random.between(1, 7);
    s.stride = random.between(1, 3), s.dilation = coin() ? random.between(1, 3) : 1;
    const int64_t most = coin() ? 4 : 1;
    for (int64_t& pad : s.pads) pad = random.between(0, most);
    if (coin()) s.pad(s.pads[0]);
    if (op != Op::partial) {
      s.mode = kModes[random.between(0, 2)], s.activation = kActivations[random.between(0, 6)];
      if (coin()) s.alpha = 0.75;
      s.gain = op == Op::gated && coin() ? 1.5 : 1.0;
    }
    s.bias = coin(), s.window = coin(), s.ieee = coin(2);
    s.wide = s.dtype == IRT_BF16 && op != Op::partial && coin();
    if (op == Op::fused) {
      s.scale = coin(), s.shift = coin();
      s.residual = static_cast<Residual>(random.between(0, 2));
      s.upsample = coin(2) ? 2 : 1;
      s.transposed = coin(3);
      if (s.transposed) s.upsample = 1, s.mode = kModes[0], s.output_padding = random.between(0, s.stride - 1);
      if (coin(3)) s.first = 32, s.inputs = 32 + random.between(1, 3), s.apart = coin();
      if (coin(2) && coin()) s.kh = s.kw = 3, s.stride = 1, s.upsample = 1, s.transposed = false, s.output_padding = 0;
      if (!s.first && coin() && s.takes_beside()) s.beside = kChannels[random.between(0, 11)];
    }
    if (op == Op::partial || (op == Op::fused && coin(2))) {
      s.mask_images = coin() ? 1 : s.b, s.mask_channels = coin() ? 1 : s.inputs;
    }
    s.memory = static_cast<Memory>(random.between(0, 3));
    s.parameters = coin() ? Memory::nchw : static_cast<Memory>(random.between(0, 3));
    s.out_memory = static_cast<Memory>(random.between(0, 2));
    if (s.possible()) return s;
  }
}

struct Estimate {
  double value = 0.0, magnitude = 0.0;
};

inline double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }

inline Estimate activated(const Estimate& e, const char* name, double alpha) {
  const double x = e.value, a = std::isnan(alpha) ? (!strcmp(name, "leaky_relu") ? 0.2 : 1.0) : alpha;
  double y = x, slope = 1.0;
  if (!strcmp(name, "relu")) y = x < 0.0 ? 0.0 : x;
  if (!strcmp(name, "leaky_relu")) y = x > 0.0 ? x : a * x, slope = std::max(1.0, std::fabs(a));
  if (!strcmp(name, "elu")) y = x > 0.0 ? x : a * std::expm1(x), slope = std::max(1.0, std::fabs(a));
  if (!strcmp(name, "silu")) y = x * logistic(x), slope = 1.1;
  if (!strcmp(name, "sigmoid")) y = logistic(x);
  if (!strcmp(name, "tanh")) y = std::tanh(x);
  return {y, slope * e.magnitude + 2.0 * std::fabs(y)};
}

// A call with its tensors, filled.
class Convolution {
 public:
  const Setting s;
  std::unique_ptr<Tensor> x[2], weight, rest, beside[2], bias, scale, shift, mask, residual, out, updated;

  Convolution(Random& random, const Setting& setting) : s(setting) {
    const auto make = [&](std::unique_ptr<Tensor>& t, bool wanted, const Shape& shape, Memory memory) {
      if (wanted) t = std::make_unique<Tensor>(random, s.dtype, shape, memory);
    };
    const auto parameter = [&](std::unique_ptr<Tensor>& t, bool wanted, const Shape& shape, Memory memory) {
      if (wanted) t = std::make_unique<Tensor>(random, s.parameter(), shape, memory);
    };
    const auto vector = [&](std::unique_ptr<Tensor>& t, bool wanted) {
      parameter(t, wanted, {{s.filters(), 1, 1, 1}}, s.parameters);
    };
    const Shape result{{s.b, s.outputs, s.out_size(0), s.out_size(1)}};
    make(x[0], true, {{s.b, s.first ? s.first : s.inputs, s.h, s.w}}, s.memory);
    make(x[1], s.first != 0, {{s.b, s.inputs - s.first, s.h, s.w}}, s.memory);
    const auto filters = [&](int64_t inputs) {
      return Shape{{s.transposed ? inputs : s.filters(), s.transposed ? s.filters() : inputs, s.kh, s.kw}};
    };
    parameter(weight, true, filters(s.apart ? s.first : s.inputs), s.parameters);
    parameter(rest, s.apart, filters(s.inputs - s.first), Memory::nchw);
    make(beside[0], s.beside != 0, {{s.b, s.beside, s.out_size(0), s.out_size(1)}}, s.memory);
    parameter(beside[1], s.beside != 0, {{s.outputs, s.beside, 1, 1}}, s.parameters);
    vector(bias, s.bias), vector(scale, s.scale), vector(shift, s.shift);
    make(mask, s.mask_images != 0, {{s.mask_images, s.mask_channels, s.h, s.w}}, s.memory);
    make(residual, s.residual != Residual::none, result, s.memory);
    make(out, true, result, s.out_memory);
    make(updated, s.op == Op::partial, {{s.b, 1, s.out_size(0), s.out_size(1)}}, s.out_memory);
    for (Tensor* t : given()) {
      if (t != mask.get()) t->fill(random, s.wide && t->view().dtype == IRT_F32 ? 12 : 0);
    }
    if (!mask) return;
    constexpr double kFactors[] = {0.0, 0.0, 1.0, 1.0, 0.5};  // exact in products and in the plane's sums
    mask->for_each(
        [&](int64_t i, int64_t c, int64_t y, int64_t at) { mask->set(i, c, y, at, kFactors[random.between(0, 4)]); });
  }

  std::vector<Tensor*> given() const {
    std::vector<Tensor*> all;
    for (const auto* t :
         {&x[0], &x[1], &weight, &rest, &beside[0], &beside[1], &bias, &scale, &shift, &mask, &residual}) {
      if (*t) all.push_back(t->get());
    }
    return all;
  }

  // Runs the op; inputs must stay as they are.
  irt_status run(int threads) const {
    std::vector<unsigned char> before = bytes_of_inputs();
    Arguments a(*this);
    irt_call call = call_of(a.values.data(), a.count(), a.outs, updated ? 2 : 1, threads);
    call.ieee = s.ieee;
    irt_status status;
    memset(&status, 0x7e, sizeof status);
    irt_cpu_find(kOps[static_cast<int>(s.op)])(&call, &status);
    CHECK(before == bytes_of_inputs(), "%s: an input was written", s.text().c_str());
    return status;
  }

  // The op's arguments in schema order, to be changed by who tests refusals.
  struct Arguments {
    irt_view views[11]{}, outs[2]{};
    std::vector<irt_value> values;  // and one that no op has

    explicit Arguments(const Convolution& c) {
      const Setting& s = c.s;
      int used = 0;
      const auto tensor = [&](const std::unique_ptr<Tensor>& t, int rank = 4) {
        if (!t) return none();
        views[used] = t->view();
        views[used].ndim = rank;
        return value(views[used++]);
      };
      const auto number = [](int64_t i) {
        irt_value made{IRT_INT, 1, {}};
        made.i = i;
        return made;
      };
      const irt_value image = tensor(c.x[0]), filters = tensor(c.weight), shifts = tensor(c.bias, 1);
      const irt_value alpha = std::isnan(s.alpha) ? none() : value(s.alpha), sides = list(s.pads, 4);
      const irt_value act = value(s.activation), mode = value(s.mode);
      const irt_value stride = number(s.stride), dilation = number(s.dilation);
      if (s.op == Op::gated) {
        values = {image, filters, shifts, stride, sides, dilation, mode, act, alpha, value(s.gain)};
      } else if (s.op == Op::partial) {
        const char* scale = s.window ? "window" : "one";
        values = {image, tensor(c.mask), filters, shifts, stride, sides, dilation, value(scale), value(s.eps)};
      } else {
        const char* order = s.residual == Residual::before ? "before" : "after";
        values = {image,
                  filters,
                  shifts,
                  stride,
                  sides,
                  dilation,
                  number(1),
                  mode,
                  tensor(c.mask),
                  number(s.upsample),
                  number(s.transposed),
                  number(s.output_padding),
                  tensor(c.scale, 1),
                  tensor(c.shift, 1),
                  act,
                  alpha,
                  tensor(c.residual),
                  value(order),
                  tensor(c.beside[0] ? c.beside[0] : c.x[1]),
                  tensor(c.rest ? c.rest : c.beside[1])};
      }
      values.push_back(none());
      outs[0] = c.out->view();
      outs[1] = c.updated ? c.updated->view() : irt_view{};
    }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;
    int count() const { return static_cast<int>(values.size()) - 1; }
  };

  // What `out` has to be, in the order of Tensor::for_each. `spread`: the sums' magnitudes are those of norms.
  std::vector<Estimate> truth(bool spread) const {
    std::vector<Estimate> all;
    for (int64_t i = 0; i < s.b; ++i) {
      std::vector<Estimate> filtered = sums(i, spread);
      if (s.beside) add_beside(i, filtered);
      const std::vector<double> windows = s.op == Op::partial ? mask_sums(i) : std::vector<double>();
      const int64_t area = s.out_size(0) * s.out_size(1);
      for (int64_t o = 0; o < s.outputs; ++o) {
        for (int64_t p = 0; p < area; ++p) {
          const Estimate sum = filtered[at(o * area + p)];
          if (s.op == Op::partial) {
            all.push_back(renormalised(sum, windows[at(p)], o));
          } else if (s.op == Op::gated) {
            all.push_back(gated(sum, filtered[at((s.outputs + o) * area + p)], o));
          } else {
            all.push_back(finished(sum, i, o, p / s.out_size(1), p % s.out_size(1)));
          }
        }
      }
    }
    return all;
  }

  // The sum of the mask over each window of image i.
  std::vector<double> mask_sums(int64_t i) const {
    const int64_t height = s.out_size(0), width = s.out_size(1), image = s.mask_images == 1 ? 0 : i;
    std::vector<double> all(at(height * width), 0.0);
    for (int64_t y = 0; y < height * width; ++y) {
      for (int64_t t = 0; t < s.taps(); ++t) {
        const int64_t row = y / width * s.stride - s.pads[0] + t / s.kw * s.dilation;
        const int64_t column = y % width * s.stride - s.pads[1] + t % s.kw * s.dilation;
        if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
        for (int64_t c = 0; c < s.mask_channels; ++c) all[at(y)] += mask->get(image, c, row, column);
      }
    }
    return all;
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  std::vector<unsigned char> bytes_of_inputs() const {
    std::vector<unsigned char> all;
    for (const Tensor* t : given()) {
      const std::vector<unsigned char> some = t->bytes();
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }

  int64_t columns_of_plane() const { return s.transposed ? s.w : s.pads[1] + s.w * s.upsample + s.pads[3]; }

  // One channel of image i: joined, masked, doubled and padded. (A transposed convolution takes its padding off the
  // result.)
  std::vector<double> plane(int64_t i, int64_t c) const {
    const int64_t height = s.h * s.upsample, width = s.w * s.upsample;
    const int64_t top = s.transposed ? 0 : s.pads[0], left = s.transposed ? 0 : s.pads[1];
    const int64_t rows = s.transposed ? height : top + height + s.pads[2], columns = columns_of_plane();
    const bool second = s.first && c >= s.first;
    const auto origin = [&](int64_t p, int64_t size) {  // or −1 for zero
      if (p >= 0 && p < size) return p;
      if (!strcmp(s.mode, "zeros")) return int64_t{-1};
      if (!strcmp(s.mode, "replicate")) return std::clamp<int64_t>(p, 0, size - 1);
      return p < 0 ? -p : 2 * (size - 1) - p;
    };
    std::vector<double> all(at(rows * columns), 0.0);
    for (int64_t p = 0; p < rows * columns; ++p) {
      int64_t y = origin(p / columns - top, height), column = origin(p % columns - left, width);
      if (y < 0 || column < 0) continue;
      y /= s.upsample, column /= s.upsample;
      all[at(p)] = x[second]->get(i, second ? c - s.first : c, y, column);
      if (mask) all[at(p)] *= mask->get(s.mask_images == 1 ? 0 : i, s.mask_channels == 1 ? 0 : c, y, column);
    }
    return all;
  }

  double weight_at(int64_t o, int64_t c, int64_t y, int64_t column) const {
    const bool second = s.apart && c >= s.first;
    const Tensor& t = second ? *rest : *weight;
    if (second) c -= s.first;
    return as_read(s.transposed ? t.get(c, o, y, column) : t.get(o, c, y, column));
  }
  double as_read(double factor) const { return s.wide ? rounded_to_bf16(factor) : factor; }

  // sums += the 1×1 convolution beside them, of image i.
  void add_beside(int64_t i, std::vector<Estimate>& all) const {
    const int64_t width = s.out_size(1), area = s.out_size(0) * width;
    for (int64_t o = 0; o < s.outputs; ++o) {
      for (int64_t p = 0; p < area; ++p) {
        for (int64_t c = 0; c < s.beside; ++c) {
          const double v = as_read(beside[1]->get(o, c, 0, 0)) * beside[0]->get(i, c, p / width, p % width);
          all[at(o * area + p)].value += v, all[at(o * area + p)].magnitude += std::fabs(v);
        }
      }
    }
  }

  // [filter][pixel]
  std::vector<Estimate> sums(int64_t i, bool spread) const {
    const int64_t height = s.out_size(0), width = s.out_size(1), area = height * width;
    std::vector<Estimate> all(at(s.filters() * area));
    const int64_t columns = columns_of_plane();
    for (int64_t c = 0; c < s.inputs; ++c) {
      const std::vector<double> image = plane(i, c);
      double largest = 0.0;
      for (double v : image) largest = std::max(largest, std::fabs(v));
      for (int64_t o = 0; o < s.filters(); ++o) {
        Estimate* sum = &all[at(o * area)];
        for (int64_t t = 0; t < s.taps(); ++t) {
          const int64_t ky = t / s.kw * s.dilation, kx = t % s.kw * s.dilation;
          const double factor = weight_at(o, c, t / s.kw, t % s.kw);
          const auto add = [&](int64_t p, double v) {
            sum[p].value += factor * v;
            if (!spread) sum[p].magnitude += std::fabs(factor * v);
          };
          for (int64_t p = 0; spread && p < area; ++p) sum[p].magnitude += std::fabs(factor) * largest;
          if (s.transposed) {
            for (int64_t q = 0; q < s.h * s.w; ++q) {
              const int64_t y = q / s.w * s.stride - s.pads[0] + ky, at_x = q % s.w * s.stride - s.pads[1] + kx;
              if (y >= 0 && y < height && at_x >= 0 && at_x < width) add(y * width + at_x, image[at(q)]);
            }
            continue;
          }
          for (int64_t y = 0; y < height; ++y) {
            const double* row = &image[at((y * s.stride + ky) * columns + kx)];
            for (int64_t at_x = 0; at_x < width; ++at_x) add(y * width + at_x, row[at_x * s.stride]);
          }
        }
      }
    }
    return all;
  }

  static Estimate plus(const Estimate& e, double more) {
    return {e.value + more, e.magnitude + std::fabs(more) + std::fabs(e.value + more)};
  }
  Estimate affine(Estimate e, int64_t filter) const {
    if (scale) {
      const double factor = scale->get(filter, 0, 0, 0);
      e = {e.value * factor, e.magnitude * std::fabs(factor) + std::fabs(e.value * factor)};
    }
    if (shift) e = plus(e, shift->get(filter, 0, 0, 0));
    return bias ? plus(e, bias->get(filter, 0, 0, 0)) : e;
  }
  Estimate finished(const Estimate& sum, int64_t i, int64_t o, int64_t y, int64_t column) const {
    Estimate e = affine(sum, o);
    if (s.residual == Residual::before) e = plus(e, residual->get(i, o, y, column));
    e = activated(e, s.activation, s.alpha);
    return s.residual == Residual::after ? plus(e, residual->get(i, o, y, column)) : e;
  }
  Estimate gated(const Estimate& features, const Estimate& gates, int64_t o) const {
    const Estimate f = activated(affine(features, o), s.activation, s.alpha), g = affine(gates, s.outputs + o);
    const double gate = logistic(g.value), v = s.gain * f.value * gate;
    return {v, std::fabs(s.gain) * (f.magnitude * gate + 0.25 * g.magnitude * std::fabs(f.value)) + 2.0 * std::fabs(v)};
  }
  Estimate renormalised(const Estimate& sum, double window, int64_t o) const {
    const double u = std::clamp(window, 0.0, 1.0), outer = bias ? u : 1.0;
    if (u == 0.0) return {};
    const double all = s.window ? static_cast<double>(s.mask_channels * s.taps()) : 1.0,
                 ratio = all / (window + s.eps) * u;
    const Estimate e = affine({sum.value * ratio, (sum.magnitude + std::fabs(sum.value)) * ratio}, o);
    return {e.value * outer, e.magnitude * outer};
  }
};

// Whether `out` is the truth up to `units` roundings of its magnitude, and of its format. The largest error, in units.
inline double check_result(const Convolution& c, const std::vector<Estimate>& truth, double units, const char* what) {
  const int dtype = c.s.dtype;
  double largest = 0.0;
  size_t i = 0;
  c.out->for_each([&](int64_t b, int64_t o, int64_t y, int64_t x) {
    const Estimate& want = truth[i++];
    const double got = c.out->get(b, o, y, x), unit = 0x1p-24 * want.magnitude, error = std::fabs(got - want.value);
    const double band = units * unit,
                 rounding = dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want.value) + band, dtype);
    const bool equal = got == want.value || (std::isnan(got) && std::isnan(want.value));
    CHECK(equal || error <= band + rounding, "%s, %s: (%lld, %lld, %lld, %lld) is %.9g, not %.9g ± %.3g", what,
          c.s.text().c_str(), static_cast<long long>(b), static_cast<long long>(o), static_cast<long long>(y),
          static_cast<long long>(x), got, want.value, band);
    if (!equal && dtype == IRT_F32 && error > largest * unit) largest = error / unit;
  });
  CHECK(c.out->canaries_live(), "%s, %s: written beside the output", what, c.s.text().c_str());
  return largest;
}

}  // namespace
