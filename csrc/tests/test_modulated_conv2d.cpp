// modulated_conv2d against plain sums in double of its definition: zeros, filter, convolution; formats, layouts,
// threads, large and small doubled images, all options together; and wrong calls.
#include <climits>

#include "tensors.h"

namespace {

// Of float's precision on a sum's terms: Winograd's form combines a whole tile, the others are direct.
constexpr double kDirect = 12.0, kWinograd = 60.0, kWinogradIeee = 12.0;
constexpr double kStored = 0x1p-7;  // bf16: of the terms, which are rounded once or, where doubled, twice

struct Setting {
  int dtype = IRT_F32;
  int64_t b = 1, inputs = 1, outputs = 1, h = 1, w = 1, kernel = 3, up = 1, down = 1, pad = 1, taps = 4;
  bool demodulate = true, flip = false, ieee = false, noise = false, strength = false, bias = false, bounded = false;
  bool outer = true;
  Memory memory = Memory::nchw, parameters = Memory::nchw, out_memory = Memory::nchw;
  int threads = 2;

  int64_t before() const { return pad + (up > 1 ? (taps + 1) / 2 : down > 1 ? (taps - 1) / 2 : 0); }
  int64_t after() const { return pad + (up * down > 1 ? taps / 2 - 1 : 0); }
  int64_t fir() const { return up * down > 1 ? taps - 1 : 0; }
  int64_t size(int64_t n) const {
    const int64_t room = n * up + before() + after() - fir() - kernel;
    return room < 0 ? 0 : room / down + 1;
  }
};

enum {
  kX,
  kWeight,
  kStyle,
  kDemodulate,
  kEps,
  kWeightGain,
  kUp,
  kDown,
  kPad,
  kFlip,
  kFilter,
  kNoise,
  kStrength,
  kBias
};
enum { kActivation = kBias + 1, kAlpha, kGain, kClamp, kCount };

struct Subject {
  Setting s;
  Tensor x, weight, style, filter, noise, strength, bias, out;
  irt_view matrix, taps, vector, number;
  irt_value args[kCount];

  Subject(Random& random, const Setting& setting)
      : s(setting),
        x(random, s.dtype, {{s.b, s.inputs, s.h, s.w}}, s.memory),
        weight(random, s.dtype, {{s.outputs, s.inputs, s.kernel, s.kernel}}, s.parameters),
        style(random, s.dtype, {{1, 1, s.b, s.inputs}}, Memory::nchw),
        filter(random, IRT_F32, {{1, 1, s.taps, s.taps}}, Memory::nchw),
        noise(random, s.dtype, {{s.b, 1, s.size(s.h), s.size(s.w)}}, s.memory),
        strength(random, s.dtype, {{1, 1, 1, 1}}, Memory::nchw),
        bias(random, s.dtype, {{1, 1, 1, s.outputs}}, Memory::nchw),
        out(random, s.dtype, {{s.b, s.outputs, s.size(s.h), s.size(s.w)}}, s.out_memory) {
    for (Tensor* t : {&x, &weight, &style, &filter, &noise, &strength, &bias}) t->fill(random);
    for (int64_t i = 1; s.outer && i < s.taps; ++i) {
      for (int64_t j = 0; j < s.taps; ++j) filter.set(0, 0, i, j, filter.get(0, 0, 0, j));
    }
    matrix = last(style.view(), 2), taps = last(filter.view(), 2);
    vector = last(bias.view(), 1), number = last(strength.view(), 1);
    args[kX] = value(x.view()), args[kWeight] = value(weight.view()), args[kStyle] = value(matrix);
    const struct {
      int at;
      int64_t i;
    } integers[] = {{kDemodulate, s.demodulate}, {kUp, s.up}, {kDown, s.down}, {kPad, s.pad}, {kFlip, s.flip}};
    for (const auto& n : integers) args[n.at].kind = IRT_INT, args[n.at].count = 1, args[n.at].i = n.i;
    args[kEps] = value(1e-8), args[kWeightGain] = value(0.5);
    args[kFilter] = s.up * s.down > 1 ? value(taps) : none();
    args[kNoise] = s.noise ? value(noise.view()) : none(), args[kStrength] = s.strength ? value(number) : none();
    args[kBias] = s.bias ? value(vector) : none();
    args[kActivation] = value("leaky_relu"), args[kAlpha] = none(), args[kGain] = value(1.5);
    args[kClamp] = s.bounded ? value(1.25) : none();
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  // The last dimensions of a view.
  static irt_view last(irt_view view, int count) {
    for (int d = 0; d < count; ++d) {
      view.sizes[d] = view.sizes[4 - count + d], view.strides[d] = view.strides[4 - count + d];
    }
    view.ndim = count;
    return view;
  }

  irt_status run() const {
    irt_call call = call_of(args, kCount, &out.view(), 1, s.threads);
    call.ieee = s.ieee;
    irt_status status;
    irt_cpu_find("modulated_conv2d")(&call, &status);
    return status;
  }

  // Pixel (y, x) of the image as the convolution reads it, and the magnitude of its terms.
  void pixel(int64_t b, int64_t c, int64_t y, int64_t x_, double& sum, double& size) const {
    const int64_t taps_ = s.fir() + 1, before = s.before();
    sum = size = 0.0;
    for (int64_t i = 0; i < taps_; ++i) {
      for (int64_t j = 0; j < taps_; ++j) {
        const int64_t row = y + i - before, column = x_ + j - before;
        if (row < 0 || column < 0 || row % s.up || column % s.up || row / s.up >= s.h || column / s.up >= s.w) continue;
        const double tap =
            s.fir() ? static_cast<double>(s.up * s.up) * filter.get(0, 0, s.taps - 1 - i, s.taps - 1 - j) : 1;
        const double term = tap * x.get(b, c, row / s.up, column / s.up);
        sum += term, size += std::fabs(term);
      }
    }
  }

  void check(const char* what) const {
    const irt_status status = run();
    CHECK(status.code == IRT_OK, "%s: %s", what, status.message);
    CHECK(out.canaries_live(), "%s: written beside the output", what);
    const int64_t height = s.h * s.up + s.before() + s.after() - s.fir();
    const int64_t width = s.w * s.up + s.before() + s.after() - s.fir();
    std::vector<double> image(static_cast<size_t>(s.inputs * height * width)), sizes(image.size());
    for (int64_t b = 0; b < s.b; ++b) {
      double widest = 0.0;  // Winograd's error is in proportion to the largest pixels
      for (int64_t c = 0, at = 0; c < s.inputs; ++c) {
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x_ = 0; x_ < width; ++x_, ++at) {
            pixel(b, c, y, x_, image[static_cast<size_t>(at)], sizes[static_cast<size_t>(at)]);
            widest = std::fmax(widest, sizes[static_cast<size_t>(at)] * std::fabs(style.get(0, 0, b, c)));
          }
        }
      }
      for (int64_t o = 0; o < s.outputs; ++o) channel(b, o, height, width, image, sizes, widest, what);
    }
  }

  void channel(int64_t b, int64_t o, int64_t height, int64_t width, const std::vector<double>& image,
               const std::vector<double>& sizes, double widest, const char* what) const {
    double squares = 0.0, norm = 0.0;
    const auto tap = [&](int64_t c, int64_t i, int64_t j) {
      const int64_t y = s.flip ? s.kernel - 1 - i : i, x_ = s.flip ? s.kernel - 1 - j : j;
      return 0.5 * style.get(0, 0, b, c) * weight.get(o, c, y, x_);
    };
    for (int64_t c = 0; c < s.inputs; ++c) {
      for (int64_t i = 0; i < s.kernel * s.kernel; ++i) {
        squares += std::pow(tap(c, i / s.kernel, i % s.kernel), 2);
        norm += 0.5 * std::fabs(weight.get(o, c, i / s.kernel, i % s.kernel));
      }
    }
    const double d = s.demodulate ? 1.0 / std::sqrt(squares + 1e-8) : 1.0;
    for (int64_t y = 0; y < s.size(s.h); ++y) {
      for (int64_t x_ = 0; x_ < s.size(s.w); ++x_) {
        double sum = 0.0, size = 0.0;
        for (int64_t c = 0; c < s.inputs; ++c) {
          for (int64_t i = 0; i < s.kernel; ++i) {
            for (int64_t j = 0; j < s.kernel; ++j) {
              const size_t at = static_cast<size_t>((c * height + y * s.down + i) * width + x_ * s.down + j);
              sum += tap(c, i, j) * image[at], size += std::fabs(tap(c, i, j)) * sizes[at];
            }
          }
        }
        const double extra = s.noise ? noise.get(b, 0, y, x_) * (s.strength ? strength.get(0, 0, 0, 0) : 1.0) : 0.0;
        const double more = s.bias ? bias.get(0, 0, 0, o) : 0.0;
        double want = d * sum + extra + more;
        want = 1.5 * (want > 0 ? want : 0.2 * want);
        if (s.bounded) want = std::fmin(1.25, std::fmax(-1.25, want));
        const bool phases = s.down == 2 && (s.kernel == 3 || s.kernel == 4) && !s.ieee;
        const bool spreads = s.dtype == IRT_F32 && ((s.kernel == 3 && s.down == 1) || phases);
        double band =
            0x1p-24 * (spreads ? (s.ieee ? kWinogradIeee : kWinograd) * d * norm * widest : kDirect * (d * size));
        band += 0x1p-24 * 4 * (d * size + std::fabs(extra) + std::fabs(more));
        if (s.dtype == IRT_BF16) band += kStored * d * size;
        const double allowed = 1.5 * band + (s.dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + band, s.dtype));
        const double got = out.get(b, o, y, x_);
        CHECK(std::fabs(got - want) <= allowed + 0x1p-149, "%s: %.9g, not %.9g (allowed %.3g), at %d %d %d", what, got,
              want, allowed, static_cast<int>(o), static_cast<int>(y), static_cast<int>(x_));
      }
    }
  }
};

Setting random_setting(Random& random) {
  constexpr int64_t kChannels[] = {1, 2, 7, 8, 15, 16, 17, 33};
  const auto coin = [&] { return random.between(0, 1) == 0; };
  for (;;) {
    Setting s;
    s.dtype = random.between(0, 2) ? IRT_F32 : IRT_BF16;
    s.b = random.between(1, 3), s.inputs = kChannels[random.between(0, 7)], s.outputs = kChannels[random.between(0, 7)];
    s.h = random.between(1, 9), s.w = random.between(1, 9), s.kernel = random.between(0, 2) ? 3 : random.between(1, 4);
    (coin() ? s.up : s.down) = random.between(1, 2);
    s.pad = random.between(0, s.kernel), s.taps = random.between(0, 1) ? 4 : random.between(2, 6);
    s.demodulate = coin(), s.flip = coin(), s.ieee = coin(), s.noise = coin(), s.strength = s.noise && coin();
    s.bias = coin(), s.bounded = coin(), s.outer = coin(), s.threads = static_cast<int>(random.between(1, 3));
    s.memory = static_cast<Memory>(random.between(0, 3)), s.parameters = static_cast<Memory>(random.between(0, 3));
    s.out_memory = static_cast<Memory>(random.between(0, 2));
    if (s.size(s.h) > 0 && s.size(s.w) > 0) return s;
  }
}

void anything() {
  Random random{21};
  for (int i = 0; i < 400; ++i) Subject(random, random_setting(random)).check("random");
}

void large_doubled_images() {
  Random random{22};
  Setting s;
  s.inputs = 18, s.outputs = 17, s.h = 26, s.w = 27, s.up = 2, s.noise = s.bias = true;
  for (const bool flip : {false, true}) {
    for (const Memory memory : {Memory::nchw, Memory::nhwc}) {
      s.flip = flip, s.memory = s.out_memory = memory;
      Subject(random, s).check("read through the filter");
    }
  }
}

void wrong_calls() {
  Random random{23};
  Setting s;
  s.b = 2, s.inputs = 3, s.outputs = 4, s.h = 5, s.w = 6, s.up = 2;
  s.noise = s.strength = s.bias = true;
  const auto answer = [&](const char* what, const auto& change) {
    Subject subject(random, s);
    irt_view out = subject.out.view();
    change(subject, out);
    const irt_call call = call_of(subject.args, kCount, &out, 1, 2);
    irt_status status;
    irt_cpu_find("modulated_conv2d")(&call, &status);
    CHECK(status.code != IRT_OK && *status.message, "%s: accepted", what);
    irt_choice choice;
    irt_cpu_chooser("modulated_conv2d")(&call, &choice, &status);
    CHECK(status.code != IRT_OK, "%s: accepted by the chooser", what);
  };
  answer("a size", [](Subject&, irt_view& out) { --out.sizes[3]; });
  answer("outputs", [](Subject&, irt_view& out) { ++out.sizes[1]; });
  answer("a style", [](Subject& a, irt_view&) { ++a.matrix.sizes[1]; });
  answer("a style's batch", [](Subject& a, irt_view&) { --a.matrix.sizes[0]; });
  answer("a style's dtype", [](Subject& a, irt_view&) { a.matrix.dtype = IRT_BF16; });
  answer("a filter's dtype", [](Subject& a, irt_view&) { a.taps.dtype = IRT_BF16; });
  answer("a long filter", [](Subject& a, irt_view&) { a.taps.sizes[0] = 9; });
  answer("a bias", [](Subject& a, irt_view&) { ++a.vector.sizes[0]; });
  answer("a strength", [](Subject& a, irt_view&) { a.number.sizes[0] = 2; });
  answer("a strength without noise", [](Subject& a, irt_view&) { a.args[kNoise] = none(); });
  answer("a factor", [](Subject& a, irt_view&) { a.args[kUp].i = 3; });
  answer("two factors", [](Subject& a, irt_view&) { a.args[kDown].i = 2; });
  answer("padding", [](Subject& a, irt_view&) { a.args[kPad].i = LLONG_MAX; });
  answer("negative padding", [](Subject& a, irt_view&) { a.args[kPad].i = -1; });
  answer("an activation", [](Subject& a, irt_view&) { a.args[kActivation] = value("gelu"); });
  answer("no weight", [](Subject& a, irt_view&) { a.args[kWeight] = none(); });
  answer("a kind", [](Subject& a, irt_view&) { a.args[kGain] = value("1"); });
}

}  // namespace

const check::Case check::cases[] = {
    {"anything", anything},
    {"large doubled images", large_doubled_images},
    {"wrong calls", wrong_calls},
    {nullptr, nullptr},
};
