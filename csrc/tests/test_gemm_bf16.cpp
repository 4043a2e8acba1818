// Products of bf16 data (lanes.h, rows.h, gemm.h) against double, from the tensors' layouts to the sums: every number
// of channels that fills a vector of lanes or not, odd ones included, with nothing read that is not the tensor.
// Compiled once per instruction set; where that cannot multiply bf16 the same calls run on floats.
//
// Factors are bf16 numbers, so products are exact in float, and the bound is that of any float sum of K of them:
// γ_K·Σ|a||b|, γ_K = K·u/(1 − K·u), u = 2^-24.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "rows.h"

namespace irt::INPAINTRT_ISA {
namespace {

using Lane = LaneOf<bf16>;
constexpr int W = Vec::kWidth;
constexpr bool kPairs = Lane::kChannels == 2;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

static_assert(std::is_same_v<LaneOf<const bf16>, Lane> && std::is_same_v<LaneOf<float>, Single>);

size_t size(int64_t n) { return static_cast<size_t>(n); }

bf16 rounded(float x) {
  bf16 y;
  from_float(x, y);
  return y;
}

bf16 number(Random& random) { return rounded(static_cast<float>(random.between(-0xffffff, 0xffffff)) * 0x1p-24f); }

// A (pixels, channels) matrix in memory that ends with its last element; whatever is not its own is NaN.
struct Matrix {
  int64_t pixels, channels, pixel, channel;  // the latter two: strides
  std::vector<bf16> data;

  Matrix(Random& random, int64_t rows, int64_t columns, int64_t row, int64_t column)
      : pixels(rows), channels(columns), pixel(row), channel(column) {
    data.assign(size((rows - 1) * row + (columns - 1) * column + 1), rounded(kNan));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; ++c) at(i, c) = number(random);
    }
  }
  bf16& at(int64_t i, int64_t c) { return data[size(i * pixel + c * channel)]; }
  double value(int64_t i, int64_t c) const { return to_float(data[size(i * pixel + c * channel)]); }
};

int64_t lanes_of(int64_t channels) { return (channels + Lane::kChannels - 1) / Lane::kChannels; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x · wᵀ as pixels × w.pixels floats, by the steps of conv_pointwise.h.
std::vector<float> product(const Matrix& x, const Matrix& w) {
  const int64_t lanes = lanes_of(x.channels), groups = ceil_div(lanes, W), block = W * Lane::kChannels;
  std::vector<float> a(size(groups * x.pixels * W));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = x.channels - g * block;
    const Row<const bf16> row = {x.data.data() + g * block * x.channel, left < block ? left : block, x.channel,
                                 x.pixel};
    read_row<Lane>(row, x.pixels, a.data() + g * x.pixels * W);
    for (int64_t i = 0; i < x.pixels && left < block; ++i) {  // gemm must stop at the last channel's lane
      float* unused = a.data() + (g * x.pixels + i) * W;
      for (int64_t lane = lanes - g * W; lane < W; ++lane) unused[lane] = kNan;
    }
  }
  const int64_t panels = ceil_div(w.pixels, kPanelColumns);
  std::vector<float> b(size(panels * lanes * kPanelColumns), 0.0f);
  for (int64_t o = 0; o < w.pixels; ++o) {
    float* column = b.data() + o / kPanelColumns * lanes * kPanelColumns + o % kPanelColumns;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t left = w.channels - g * block;
      float packed[W];
      store(packed,
            Lane::across(w.data.data() + o * w.pixel + g * block * w.channel, left < block ? left : block, w.channel));
      for (int64_t i = 0; i < W && g * W + i < lanes; ++i) column[(g * W + i) * kPanelColumns] = packed[i];
    }
  }
  std::vector<float> out(size(x.pixels * w.pixels), kNan);
  const Blocks blocks = {a.data(), x.pixels * W, static_cast<int>(groups), 1,
                         static_cast<int>(lanes - (groups - 1) * W)};
  gemm<Lane>(blocks, x.pixels, b.data(), static_cast<int>(panels), [&](int panel, int64_t row, int v, Vec sums) {
    const int64_t first = static_cast<int64_t>(panel) * kPanelColumns + v * W;
    if (first < w.pixels)
      store_some(out.data() + row * w.pixels + first, sums, w.pixels - first < W ? w.pixels - first : W);
  });
  return out;
}

double largest = 0.0;  // error in units of its bound

void check_product(const Matrix& x, const Matrix& w) {
  const std::vector<float> got = product(x, w);
  const double u = 0x1p-24 * static_cast<double>(x.channels), gamma = u / (1.0 - u);
  for (int64_t i = 0; i < x.pixels; ++i) {
    for (int64_t o = 0; o < w.pixels; ++o) {
      double want = 0.0, magnitude = 0.0;
      for (int64_t c = 0; c < x.channels; ++c) {
        const double term = x.value(i, c) * w.value(o, c);
        want += term, magnitude += std::fabs(term);
      }
      const double value = got[size(i * w.pixels + o)], error = std::fabs(value - want), bound = gamma * magnitude;
      CHECK(error <= bound, "%lld channels, strides %lld and %lld: (%lld, %lld) is %.9g, not %.9g",
            static_cast<long long>(x.channels), static_cast<long long>(x.pixel), static_cast<long long>(x.channel),
            static_cast<long long>(i), static_cast<long long>(o), value, want);
      if (error > largest * bound) largest = error / bound;
    }
  }
}

// Both memory orders and a strided one, of x and of the weight, at every number of channels up to two vectors' worth.
void every_number_of_channels() {
  Random random{1};
  const int64_t pixels = 2 * W + 3, outputs = W + 1;
  for (int64_t k = 1; k <= 2 * W * Lane::kChannels + 1; ++k) {
    check_product(Matrix(random, pixels, k, k, 1), Matrix(random, outputs, k, k, 1));
    check_product(Matrix(random, pixels, k, 1, pixels + 1), Matrix(random, outputs, k, 1, outputs));
    check_product(Matrix(random, pixels, k, k + 2, 1), Matrix(random, outputs, k, 2 * k, 2));
    check_product(Matrix(random, pixels, k, 3, 3 * pixels), Matrix(random, outputs, k, k + 1, 1));
  }
  check::note("%d channels per lane; error at most %.2f of its bound", Lane::kChannels, largest);
}

void long_sums_and_every_height_of_a_tile() {
  Random random{2};
  const Matrix w(random, 2 * kPanelColumns, 1025, 1025, 1);
  for (int64_t pixels = 1; pixels <= 2 * kTileRows + 1; ++pixels) {
    check_product(Matrix(random, pixels, 1025, 1025, 1), w);
  }
}

// One product of x with 1 among zeros: infinities and NaN come through; subnormals are 0 to pairs, exact to floats.
void special_values() {
  const float least = 0x1p-126f;  // normal
  const float values[] = {kInfinity, -kInfinity, kNan, 0x1.fep127f, least, -least, 0x1p-127f, -0x1p-133f, 0.0f};
  Random random{3};
  for (const float x : values) {
    for (int64_t place = 0; place < 3; ++place) {
      Matrix one(random, 1, 3, 3, 1), other(random, 1, 3, 3, 1);
      for (int64_t c = 0; c < 3; ++c) one.at(0, c) = rounded(c == place ? x : 0.0f), other.at(0, c) = rounded(1.0f);
      const float got = product(one, other)[0];
      const float want = kPairs && std::fabs(x) < least ? 0.0f : x;
      CHECK(got == want || (want != want && got != got), "%g gives %g", static_cast<double>(x),
            static_cast<double>(got));
    }
  }
}

// Halves to round, which VDPBF16PS must do like everything else here: to nearest even.
void sums_are_rounded_to_nearest_even() {
  Random random{4};
  const struct {
    float small, sum;
  } cases[] = {{0x1p-24f, 1.0f}, {0x1.8p-24f, 1.0f + 0x1p-23f}, {0x1.8p-23f, 1.0f + 0x1p-22f}};
  for (const auto& c : cases) {
    Matrix x(random, 1, 3, 3, 1), w(random, 1, 3, 3, 1);
    const float terms[] = {1.0f, 0.0f, c.small};  // in two lanes
    for (int64_t i = 0; i < 3; ++i) x.at(0, i) = rounded(terms[i]), w.at(0, i) = rounded(1.0f);
    const float got = product(x, w)[0];
    CHECK(got == c.sum, "1 + %a is %a", static_cast<double>(c.small), static_cast<double>(got));
  }
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"every number of channels", every_number_of_channels},
    {"long sums and every height of a tile", long_sums_and_every_height_of_a_tile},
    {"special values", special_values},
    {"sums are rounded to nearest even", sums_are_rounded_to_nearest_even},
    {nullptr, nullptr},
};
