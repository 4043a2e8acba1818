// gated_activation and its gradient against plain double loops: formats, activations, layouts, sizes from 0 on,
// threads.
//
// The bound of each element is its rounding band: a few units of float's precision on the magnitudes that enter the
// formula, and half a unit of the storage format. `kUnits` is what was measured, rounded up.
#include <cstdio>

#include "tensors.h"

namespace {

constexpr double kUnits = 6.0;
constexpr double kFloatUnit = 0x1p-24;

const char* const kActivations[] = {"none", "relu", "leaky_relu", "elu", "silu", "sigmoid", "tanh"};
const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};
const char* const kNames[] = {"f32", "f16", "bf16"};

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double act(const char* name, double x, double alpha) {
  if (!strcmp(name, "relu")) return x < 0.0 ? 0.0 : x;
  if (!strcmp(name, "leaky_relu")) return x > 0.0 ? x : alpha * x;
  if (!strcmp(name, "elu")) return x > 0.0 ? x : alpha * std::expm1(x);
  if (!strcmp(name, "silu")) return x * sigmoid(x);
  if (!strcmp(name, "sigmoid")) return sigmoid(x);
  if (!strcmp(name, "tanh")) return std::tanh(x);
  return x;
}

double slope(const char* name, double x, double alpha) {
  const double s = sigmoid(x), t = std::tanh(x);
  if (!strcmp(name, "relu")) return x <= 0.0 ? 0.0 : 1.0;
  if (!strcmp(name, "leaky_relu")) return x > 0.0 ? 1.0 : alpha;
  if (!strcmp(name, "elu")) return x > 0.0 ? 1.0 : alpha * std::exp(x);
  if (!strcmp(name, "silu")) return s * (1.0 + x * (1.0 - s));
  if (!strcmp(name, "sigmoid")) return s * (1.0 - s);
  if (!strcmp(name, "tanh")) return 1.0 - t * t;
  return 1.0;
}

// What the terms of the slope are as large as: where they cancel, their rounding stays.
double slope_magnitude(const char* name, double x, double alpha) {
  if (!strcmp(name, "silu")) return sigmoid(x) * (1.0 + std::fabs(x));
  if (!strcmp(name, "sigmoid")) return sigmoid(x);
  if (!strcmp(name, "tanh")) return 1.0;
  return std::fabs(slope(name, x, alpha));
}

double largest = 0.0;  // error in units of the float band, of float32 results

// Whether `got` is `want` up to the rounding of the format and `kUnits` roundings of `magnitude`.
bool close(double got, double want, double magnitude, int dtype) {
  if (std::isnan(want) || std::isinf(want)) return got == want || (std::isnan(got) && std::isnan(want));
  const double error = std::fabs(got - want), band = kFloatUnit * std::fabs(magnitude) + 0x1p-149;
  if (dtype == IRT_F32 && error / band > largest) largest = error / band;
  return error <= kUnits * band + (dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + kUnits * band, dtype));
}

struct Case {
  const char* activation;
  double alpha, gain;  // NaN: the argument is absent
  double used_alpha() const {
    if (std::isnan(alpha)) return !strcmp(activation, "leaky_relu") ? static_cast<double>(0.2f) : 1.0;
    return static_cast<double>(static_cast<float>(alpha));
  }
  double used_gain() const { return static_cast<double>(static_cast<float>(gain)); }
  irt_value alpha_value() const { return std::isnan(alpha) ? none() : value(alpha); }
};

Shape doubled(Shape s) {
  s.sizes[1] *= 2;
  return s;
}

void run_forward(const Case& c, const Tensor& y, const Tensor& out, int threads) {
  const irt_value args[] = {value(y.view()), value(c.activation), c.alpha_value(), value(c.gain)};
  const irt_call call = call_of(args, 4, &out.view(), 1, threads);
  irt_status status;
  irt_cpu_find("gated_activation")(&call, &status);
  CHECK(status.code == IRT_OK, "%s", status.message);
}

void run_backward(const Case& c, const Tensor& grad, const Tensor& y, const Tensor& out, int threads) {
  const int64_t needs[] = {1};
  const irt_value args[] = {list(grad.view(), 1), value(y.view()), value(c.activation),
                            c.alpha_value(),      value(c.gain),   list(needs, 1)};
  const irt_call call = call_of(args, 6, &out.view(), 1, threads);
  irt_status status;
  irt_cpu_find("gated_activation_backward")(&call, &status);
  CHECK(status.code == IRT_OK, "%s", status.message);
}

void check_forward(const Case& c, const Tensor& y, const Tensor& out, const char* what) {
  const int dtype = out.view().dtype;
  const int64_t channels = out.view().sizes[1];
  out.for_each([&](int64_t b, int64_t ch, int64_t h, int64_t w) {
    const double f = y.get(b, ch, h, w), g = y.get(b, ch + channels, h, w), got = out.get(b, ch, h, w);
    const double want = c.used_gain() * act(c.activation, f, c.used_alpha()) * sigmoid(g);
    CHECK(close(got, want, want, dtype), "%s %s %s: f %g g %g gives %.9g, not %.9g", what, kNames[dtype], c.activation,
          f, g, got, want);
  });
  CHECK(out.canaries_live(), "%s %s: written beside the output", what, c.activation);
}

void check_backward(const Case& c, const Tensor& grad, const Tensor& y, const Tensor& out, const char* what) {
  const int dtype = out.view().dtype;
  const int64_t channels = grad.view().sizes[1];
  grad.for_each([&](int64_t b, int64_t ch, int64_t h, int64_t w) {
    const double f = y.get(b, ch, h, w), g = y.get(b, ch + channels, h, w), alpha = c.used_alpha();
    const double a = act(c.activation, f, alpha), s = sigmoid(g), scaled = c.used_gain() * grad.get(b, ch, h, w) * s;
    const double df = scaled * slope(c.activation, f, alpha), dg = scaled * a * (1.0 - s);
    const double got_df = out.get(b, ch, h, w), got_dg = out.get(b, ch + channels, h, w);
    CHECK(close(got_df, df, scaled * slope_magnitude(c.activation, f, alpha), dtype),
          "%s %s %s: f %g g %g gives df %.9g, not %.9g", what, kNames[dtype], c.activation, f, g, got_df, df);
    CHECK(close(got_dg, dg, scaled * a, dtype), "%s %s %s: f %g g %g gives dg %.9g, not %.9g", what, kNames[dtype],
          c.activation, f, g, got_dg, dg);
  });
  CHECK(out.canaries_live(), "%s %s: written beside the gradient", what, c.activation);
}

// Both directions, on tensors of the given layouts; inputs must come out as they went in.
void round_trip(Random& random, const Case& c, int dtype, const Shape& shape, Memory in, Memory grad_in, Memory out_in,
                int threads, const char* what) {
  Tensor y(random, dtype, doubled(shape), in), grad(random, dtype, shape, grad_in);
  const Tensor out(random, dtype, shape, out_in), dy(random, dtype, doubled(shape), out_in);
  y.fill(random);
  grad.fill(random);
  const std::vector<unsigned char> y_before = y.bytes(), grad_before = grad.bytes();
  run_forward(c, y, out, threads);
  check_forward(c, y, out, what);
  run_backward(c, grad, y, dy, threads);
  check_backward(c, grad, y, dy, what);
  CHECK(y.bytes() == y_before && grad.bytes() == grad_before, "%s: an input was written", what);
}

Memory output_memory(Random& random) { return static_cast<Memory>(random.between(0, 2)); }
Memory input_memory(Random& random) { return static_cast<Memory>(random.between(0, 3)); }

void every_activation_in_every_layout() {
  Random random{3};
  for (int dtype : kDtypes) {
    for (const char* activation : kActivations) {
      for (double alpha : {static_cast<double>(NAN), 0.3}) {
        for (int round = 0; round < 24; ++round) {
          Shape shape;
          for (int64_t& size : shape.sizes) size = random.between(0, 3) ? random.between(1, 5) : random.between(6, 21);
          const Case c{activation, alpha, round % 2 ? 1.0 : -0.75};
          round_trip(random, c, dtype, shape, input_memory(random), input_memory(random), output_memory(random), 1,
                     "small");
        }
        for (Memory memory : {Memory::nchw, Memory::nhwc}) {
          round_trip(random, {activation, alpha, 1.5}, dtype, {{2, 19, 3, 17}}, memory, memory, memory, 1, "dense");
        }
      }
    }
  }
  check::note("float32: at most %.2f of %.0f units", largest, kUnits);
}

void shares_of_threads() {
  Random random{4};
  const Case c{"elu", NAN, 1.0};
  for (int threads : {2, 3, 7}) {
    for (int dtype : kDtypes) {
      round_trip(random, c, dtype, {{1, 8, 97, 83}}, Memory::nchw, Memory::nchw, Memory::nchw, threads, "threads");
      round_trip(random, c, dtype, {{3, 37, 29, 23}}, Memory::nhwc, Memory::nhwc, Memory::nhwc, threads, "threads");
      round_trip(random, c, dtype, {{2, 11, 61, 53}}, Memory::random, Memory::expanded, Memory::random, threads,
                 "threads");
    }
  }
}

void empty_tensors_without_memory() {
  Random random{5};
  for (int dtype : kDtypes) {
    for (int empty = 0; empty < 4; ++empty) {
      Shape shape{{2, 3, 4, 5}};
      shape.sizes[empty] = 0;
      for (int threads : {1, 4}) {
        round_trip(random, {"elu", NAN, 1.0}, dtype, shape, Memory::nchw, Memory::nchw, Memory::nchw, threads, "empty");
      }
    }
  }
}

// Infinities, NaN, zeros and saturated gates, at every lane of a vector and in its rest.
void special_values() {
  Random random{6};
  const double values[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 80.0, -80.0};
  constexpr int kValues = 11;
  for (int dtype : kDtypes) {
    for (const char* activation : kActivations) {
      const Case c{activation, NAN, 1.0};
      const Shape shape{{1, 1, kValues, kValues}};
      Tensor y(random, dtype, doubled(shape), Memory::nchw);
      const Tensor out(random, dtype, shape, Memory::nchw);
      for (int64_t i = 0; i < kValues; ++i) {
        for (int64_t j = 0; j < kValues; ++j) {
          y.set(0, 0, i, j, values[i]);
          y.set(0, 1, i, j, values[j]);
        }
      }
      run_forward(c, y, out, 1);
      check_forward(c, y, out, "special");

      // Finite features: where one is infinite and its gate saturated, 0·inf depends on which of them rounded first.
      Tensor grad(random, dtype, shape, Memory::nchw);
      const Tensor dy(random, dtype, doubled(shape), Memory::nchw);
      grad.for_each([&](int64_t b, int64_t ch, int64_t h, int64_t w) {
        grad.set(b, ch, h, w, 1.0);
        if (std::isinf(values[h])) y.set(b, ch, h, w, 2.0);
      });
      run_backward(c, grad, y, dy, 1);
      check_backward(c, grad, y, dy, "special");
    }
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"every activation in every layout", every_activation_in_every_layout},
    {"shares of threads", shares_of_threads},
    {"empty tensors without memory", empty_tensors_without_memory},
    {"special values", special_values},
    {nullptr, nullptr},
};
