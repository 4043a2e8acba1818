// simd.h against double and against formulas that share nothing with it. Compiled once per instruction set.
#include "simd.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "check.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// f at one point, through a whole vector whose lanes must agree.
float at(Vec (*f)(Vec), float x) {
  float lanes[Vec::kWidth];
  store(lanes, f(Vec(x)));
  for (float lane : lanes) CHECK(float_to_bits(lane) == float_to_bits(lanes[0]), "lanes differ at %g", x);
  return lanes[0];
}

// Distance in units of the last place of `want` (a float's, subnormal ones too; infinity counts as 2^128).
double ulps(float got, double want) {
  const double limit = std::ldexp(1.0, 128);
  if (std::isnan(got) || std::isnan(want)) return std::isnan(got) && std::isnan(want) ? 0.0 : limit;
  const double value = std::isinf(got) ? std::copysign(limit, got) : static_cast<double>(got);
  if (std::fabs(want) > limit) want = std::copysign(limit, want);
  int exponent = -126;
  if (want != 0.0) std::frexp(want, &exponent);
  exponent = exponent - 1 < -126 ? -126 : exponent - 1 > 127 ? 127 : exponent - 1;
  return std::fabs(value - want) / std::ldexp(1.0, exponent - 23);
}

struct Function {
  const char* name;
  Vec (*f)(Vec);
  double (*truth)(double);
  double most_ulps;  // as measured over the points below, rounded up
  float low, high;   // the range it holds for; outside, see `beyond`
  bool (*beyond)(float got);
};

const Function functions[] = {
    {"exp", exp, [](double x) { return std::exp(x); }, 1.1, -kInf, kInf, nullptr},
    {"expm1", expm1, [](double x) { return std::expm1(x); }, 1.6, -kInf, 88.37f,  // 2^128 takes part from there on
     [](float got) { return got == kInf; }},
    {"sigmoid", sigmoid, [](double x) { return 1.0 / (1.0 + std::exp(-x)); }, 2.3, -88.72f, kInf,  // e^-x is infinite
     [](float got) { return got >= 0.0f && got <= 0x1p-127f; }},
    {"tanh", tanh, [](double x) { return std::tanh(x); }, 2.6, -kInf, kInf, nullptr},
};

// A grid of every magnitude (subnormals to the largest), and a dense one where the functions are neither 0 nor 1.
template <class Visit>
void points(const Visit& visit) {
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 4001) {
    visit(bits_to_float(bits));
    visit(-bits_to_float(bits));
  }
  for (int i = -1050000; i <= 900000; i += 7) visit(static_cast<float>(i) * 1e-4f);
  for (int i = -40000; i <= 40000; ++i) visit(static_cast<float>(i) * 1e-5f);
  for (float edge : {88.37626f, 88.72284f, 87.33655f, 103.97208f, 104.0f, 89.0f, 10.0f, 0.34657359f, 1.0397208f}) {
    float up = edge, down = edge;
    for (int i = 0; i < 200; ++i) {
      for (float x : {up, down, -up, -down}) visit(x);
      up = std::nextafter(up, kInf);
      down = std::nextafter(down, -kInf);
    }
  }
}

void functions_against_double() {
  for (const Function& f : functions) {
    double worst = 0.0;
    float where = 0.0f;
    float xs[Vec::kWidth] = {}, ys[Vec::kWidth];
    int filled = 0, count = 0;
    const auto flush = [&] {
      store(ys, f.f(load(xs)));
      for (int i = 0; i < filled; ++i) {
        const double want = f.truth(xs[i]);
        const double error = ulps(ys[i], want);
        if (xs[i] < f.low || xs[i] > f.high) {
          CHECK(error <= f.most_ulps || f.beyond(ys[i]), "%s(%.9g) = %g", f.name, xs[i], ys[i]);
        } else if (error > worst) {
          worst = error;
          where = xs[i];
        }
      }
      count += filled;
      filled = 0;
    };
    points([&](float x) {
      xs[filled++] = x;
      if (filled == Vec::kWidth) flush();
    });
    flush();
    check::note("%-8s %.3f ulp at %.9g (%d points; at most %.1f allowed)", f.name, worst, where, count, f.most_ulps);
    CHECK(worst <= f.most_ulps, "%s: %.3f ulp at %.9g", f.name, worst, where);
  }
}

void functions_at_their_limits() {
  const float tiny = std::numeric_limits<float>::denorm_min(), huge = std::numeric_limits<float>::max();
  const struct {
    const char* name;
    Vec (*f)(Vec);
    float x, want;
  } expected[] = {
      {"exp", exp, kInf, kInf},         {"exp", exp, -kInf, 0.0f},        {"exp", exp, 0.0f, 1.0f},
      {"exp", exp, huge, kInf},         {"exp", exp, -huge, 0.0f},        {"exp", exp, tiny, 1.0f},
      {"exp", exp, kNan, kNan},         {"expm1", expm1, kInf, kInf},     {"expm1", expm1, -kInf, -1.0f},
      {"expm1", expm1, 0.0f, 0.0f},     {"expm1", expm1, huge, kInf},     {"expm1", expm1, -huge, -1.0f},
      {"expm1", expm1, kNan, kNan},     {"sigmoid", sigmoid, kInf, 1.0f}, {"sigmoid", sigmoid, -kInf, 0.0f},
      {"sigmoid", sigmoid, 0.0f, 0.5f}, {"sigmoid", sigmoid, huge, 1.0f}, {"sigmoid", sigmoid, -huge, 0.0f},
      {"sigmoid", sigmoid, tiny, 0.5f}, {"sigmoid", sigmoid, kNan, kNan}, {"tanh", tanh, kInf, 1.0f},
      {"tanh", tanh, -kInf, -1.0f},     {"tanh", tanh, 0.0f, 0.0f},       {"tanh", tanh, huge, 1.0f},
      {"tanh", tanh, -huge, -1.0f},     {"tanh", tanh, kNan, kNan},
  };
  for (const auto& e : expected) {
    const float got = at(e.f, e.x);
    CHECK(got == e.want || (std::isnan(got) && std::isnan(e.want)), "%s(%g) = %g, not %g", e.name, e.x, got, e.want);
  }
}

// What NaN does, and ties: kernels rely on both.
void primitives() {
  const float values[] = {kNan, -kInf, -2.5f, -1.5f,      -0.5f,       -0.0f,      0.0f,  0.5f,
                          1.5f, 2.5f,  3.7f,  4194303.5f, -4194303.5f, 8388609.0f, 1e30f, kInf};
  const auto same = [](Vec got, float want) {
    float lanes[Vec::kWidth];
    store(lanes, got);
    bool good = true;
    for (float lane : lanes) good = good && (lane == want || (std::isnan(lane) && std::isnan(want)));
    return good;
  };
  for (float x : values) {
    const bool nan = std::isnan(x);
    CHECK(same(at_least(Vec(1.0f), Vec(x)), nan ? x : x < 1.0f ? 1.0f : x), "at_least(1, %g)", x);
    CHECK(same(at_most(Vec(1.0f), Vec(x)), nan ? x : x > 1.0f ? 1.0f : x), "at_most(1, %g)", x);
    CHECK(same(if_positive(Vec(x), Vec(2.0f), Vec(3.0f)), x > 0.0f ? 2.0f : 3.0f), "if_positive(%g)", x);
    CHECK(same(if_at_most_zero(Vec(x), Vec(2.0f), Vec(3.0f)), x <= 0.0f ? 2.0f : 3.0f), "if_at_most_zero(%g)", x);
    CHECK(same(round_even(Vec(x)), nan ? x : std::nearbyint(x)), "round_even(%g)", x);
    CHECK(same(fma(Vec(x), Vec(2.0f), Vec(1.0f)), x * 2.0f + 1.0f), "fma(%g, 2, 1)", x);
  }
  for (int n = -252; n <= 252; ++n) {
    for (float x : {1.0f, -1.5f, 0x1.fffffep0f, 0x1p-100f, 0x1.000002p100f}) {
      const float want = static_cast<float>(std::ldexp(static_cast<double>(x), n));
      CHECK(same(scale_by_power(Vec(x), Vec(static_cast<float>(n))), want), "%a * 2^%d", x, n);
    }
  }
}

// ---- 16-bit storage ------------------------------------------------------------------------------------------------

// A number with `digits` fraction bits and `width` exponent bits, by the definition of binary floating point.
double decode(uint32_t bits, int width, int digits) {
  const int bias = (1 << (width - 1)) - 1, exponent = static_cast<int>(bits >> digits) & ((1 << width) - 1);
  const double fraction = bits & ((1u << digits) - 1), sign = bits >> (width + digits) & 1 ? -1.0 : 1.0;
  if (exponent == (1 << width) - 1) return fraction != 0.0 ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - digits);
  return sign * std::ldexp(fraction + std::ldexp(1.0, digits), exponent - bias - digits);
}

struct HalfFormat {
  using Type = f16;
  static constexpr const char* kName = "f16";
  static constexpr int kWidth = 5, kDigits = 10;
};
struct BrainFormat {
  using Type = bf16;
  static constexpr const char* kName = "bf16";
  static constexpr int kWidth = 8, kDigits = 7;
};

// Both ways of storing x: one element, and a vector of it.
template <class T>
uint32_t stored(float x) {
  T one, many[Vec::kWidth];
  from_float(x, one);
  store(many, Vec(x));
  for (T lane : many) CHECK(lane.bits == one.bits, "%a is stored as %04x and as %04x", x, one.bits, lane.bits);
  return one.bits;
}

template <class Format>
void every_half() {
  using T = typename Format::Type;
  const auto truth = [](uint32_t bits) { return decode(bits, Format::kWidth, Format::kDigits); };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T half{static_cast<uint16_t>(bits)};
    T many[Vec::kWidth];
    for (T& lane : many) lane = half;
    float lanes[Vec::kWidth];
    store(lanes, load(many));
    const double want = truth(bits);
    const float got = to_float(half);
    for (float lane : lanes) {
      CHECK(lane == got || (std::isnan(lane) && std::isnan(got)), "%s %04x is %a and %a", Format::kName, bits, got,
            lane);
    }
    if (std::isnan(want)) {
      CHECK(std::isnan(got), "%s %04x is no NaN", Format::kName, bits);
      CHECK(std::isnan(truth(stored<T>(got))), "NaN became %s %04x", Format::kName, stored<T>(got));
      continue;
    }
    CHECK(got == want && std::signbit(got) == std::signbit(want), "%s %04x is %a", Format::kName, bits, got);
    CHECK(stored<T>(got) == bits, "%s %04x came back as %04x", Format::kName, bits, stored<T>(got));
  }
  // Between each two neighbours: the middle goes to the even one, its float neighbours to the nearer one. The step
  // beyond the largest number leads to infinity, by the same rule.
  const uint32_t infinity = ((1u << Format::kWidth) - 1) << Format::kDigits;
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const double low = truth(bits);
    const double step = bits + 1 < infinity ? truth(bits + 1) - low : low - truth(bits - 1);
    const float middle = static_cast<float>(low + step / 2);
    CHECK(middle == low + step / 2, "%s %04x: no exact middle", Format::kName, bits);
    for (uint32_t sign : {0u, 0x8000u}) {
      const auto put = [sign](float x) { return stored<T>(sign ? -x : x); };
      CHECK(put(middle) == (sign | (bits + (bits & 1))), "%s: %a ties to %04x", Format::kName, middle, put(middle));
      const float above = std::nextafter(middle, kInf), below = std::nextafter(middle, 0.0f);
      CHECK(put(above) == (sign | (bits + 1)), "%s: %a becomes %04x", Format::kName, above, put(above));
      CHECK(put(below) == (sign | bits), "%s: %a becomes %04x", Format::kName, below, put(below));
    }
  }
  for (float x : {kInf, std::numeric_limits<float>::max()}) {
    CHECK(stored<T>(x) == infinity && stored<T>(-x) == (infinity | 0x8000u), "%s: %g becomes %04x", Format::kName, x,
          stored<T>(x));
  }
  for (uint32_t payload = 0x7f800001u; payload != 0; payload = payload > 0x7fffffffu - 9999 ? 0 : payload + 9999) {
    const uint32_t bits = stored<T>(bits_to_float(payload));
    CHECK(std::isnan(truth(bits)), "NaN %08x became %s %04x", payload, Format::kName, bits);
  }
}

// ---- parts of vectors ----------------------------------------------------------------------------------------------

template <class T>
void parts_of_vectors_as() {
  constexpr int kSteps = 3, kRoom = Vec::kWidth * kSteps;
  for (int stride = 0; stride <= kSteps; ++stride) {
    for (int n = 1; n <= Vec::kWidth; ++n) {
      T from[kRoom], to[kRoom];
      for (int i = 0; i < kRoom; ++i) {
        from_float(static_cast<float>(i + 1), from[i]);
        from_float(-1.0f, to[i]);
      }
      float lanes[Vec::kWidth];
      const Vec loaded = load_some(from, n, stride);
      store(lanes, loaded);
      for (int i = 0; i < Vec::kWidth; ++i) {
        const float want = i < n ? static_cast<float>(i * stride + 1) : 0.0f;
        CHECK(lanes[i] == want, "load_some(%d, stride %d): lane %d is %g", n, stride, i, lanes[i]);
      }
      if (stride == 0) continue;
      store_some(to, loaded, n, stride);
      for (int i = 0; i < kRoom; ++i) {
        const float want = i % stride == 0 && i / stride < n ? static_cast<float>(i + 1) : -1.0f;
        CHECK(to_float(to[i]) == want, "store_some(%d, stride %d): element %d is %g", n, stride, i, to_float(to[i]));
      }
    }
  }
}

void parts_of_vectors() {
  parts_of_vectors_as<float>();
  parts_of_vectors_as<f16>();
  parts_of_vectors_as<bf16>();
}

// Bits of every kind, NaN with payloads among them: a transposition moves, and computes nothing.
void transposed() {
  constexpr int W = Vec::kWidth;
  Random random{1};
  float from[W][W], to[W][W];
  for (auto& row : from) {
    for (float& x : row) x = bits_to_float(static_cast<uint32_t>(random.bits()));
  }
  Vec rows[W];
  for (int i = 0; i < W; ++i) rows[i] = load(from[i]);
  transpose(rows);
  for (int i = 0; i < W; ++i) store(to[i], rows[i]);
  for (int i = 0; i < W; ++i) {
    for (int k = 0; k < W; ++k) {
      CHECK(!memcmp(&to[i][k], &from[k][i], sizeof(float)), "row %d, column %d: %a, not %a", i, k, to[i][k],
            from[k][i]);
    }
  }
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"elementary functions against double", functions_against_double},
    {"elementary functions at their limits", functions_at_their_limits},
    {"primitives: NaN, ties, powers of two", primitives},
    {"every f16, both ways", every_half<HalfFormat>},
    {"every bf16, both ways", every_half<BrainFormat>},
    {"parts of vectors", parts_of_vectors},
    {"transposed", transposed},
    {nullptr, nullptr},
};
