// fft.h against a plain sum in double: every kind of length, both directions, in place and not, and not one float
// beyond what `table_floats` and `scratch_floats` promise. Compiled once per instruction set.
//
// Error is relative: its root mean square over the transform's, in units of 2^-24 · log2(2n), since each level of
// butterflies adds its roundings. A chirp's three transforms and three products have a limit of their own. The limits
// are what was measured over all instruction sets, with half as much again.
#include "fft.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int W = Vec::kWidth;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kCanary = 0x1.badbadp100f;
constexpr double kUnits = 1.0, kChirpUnits = 0.75;
constexpr double kPeak = 2.5;  // the error of an element, over what is allowed to the root mean square

size_t size(int64_t n) { return static_cast<size_t>(n); }

// `floats` of NaN, and a vector of canaries behind them; memory ends there.
struct Buffer {
  std::vector<float> memory;

  explicit Buffer(int64_t floats) : memory(size(floats + W), kNan) {
    for (int i = 0; i < W; ++i) memory[size(floats + i)] = kCanary;
  }
  float* data() { return memory.data(); }
  const float* data() const { return memory.data(); }
  int64_t floats() const { return static_cast<int64_t>(memory.size()) - W; }
  void poison() {
    for (int64_t i = 0; i < floats(); ++i) memory[size(i)] = kNan;
  }
  bool canaries_live() const {
    for (int i = 0; i < W; ++i) {
      if (memory[size(floats() + i)] != kCanary) return false;
    }
    return true;
  }
};

struct Signal {  // n complex numbers in each lane, real and imaginary parts apart
  int64_t n;
  Buffer re, im;

  explicit Signal(int64_t length) : n(length), re(length * W), im(length * W) {}
  Signal(Random& random, int64_t length) : Signal(length) {
    for (int64_t i = 0; i < n * W; ++i) {
      re.memory[size(i)] = static_cast<float>(random.between(-0xffffff, 0xffffff)) * 0x1p-24f;
      im.memory[size(i)] = static_cast<float>(random.between(-0xffffff, 0xffffff)) * 0x1p-24f;
    }
  }
  Planes planes() { return {re.data(), im.data()}; }
  bool operator==(const Signal& other) const {
    const size_t bytes = re.memory.size() * sizeof(float);
    return !memcmp(re.data(), other.re.data(), bytes) && !memcmp(im.data(), other.im.data(), bytes);
  }
  bool canaries_live() const { return re.canaries_live() && im.canaries_live(); }
};

struct Transform {
  int64_t n;
  Buffer tables, scratch;
  Fft fft;

  explicit Transform(int64_t length)
      : n(length),
        tables(Fft::table_floats(length)),
        scratch(Fft::scratch_floats(length)),
        fft(length, tables.data(), scratch.data()) {
    check("construction");
    int64_t unused = 0;
    for (int64_t i = 0; i < tables.floats(); ++i) unused += std::isnan(tables.memory[size(i)]);
    CHECK(!unused, "length %lld: %lld floats of the tables are not used", static_cast<long long>(n),
          static_cast<long long>(unused));
  }
  Transform(const Transform&) = delete;
  Transform& operator=(const Transform&) = delete;

  void run(Planes in, Planes out) {
    scratch.poison();
    fft.run(in, out, scratch.data());
    check("run");
  }
  void check(const char* when) const {
    CHECK(tables.canaries_live() && scratch.canaries_live(), "length %lld: written beyond the %s, in %s",
          static_cast<long long>(n), tables.canaries_live() ? "scratch" : "tables", when);
  }
};

int64_t largest_prime_factor(int64_t n) {
  int64_t largest = 1;
  for (int64_t p = 2; n > 1; ++p) {
    for (; n % p == 0; n /= p) largest = p;
  }
  return largest;
}

double worst = 0.0, worst_chirp = 0.0, worst_peak = 0.0;

// One lane of a transform and its inverse against e^(−2πi·jk/n) summed, jk reduced exactly; the inverse has the same
// sums in the opposite order.
void check_lane(const Signal& x, const Signal& forward, const Signal& inverse, int lane) {
  const int64_t n = x.n;
  std::vector<double> cosines(size(n)), sines(size(n)), re(size(n), 0.0), im(size(n), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const double angle = 6.283185307179586476925 * static_cast<double>(i) / static_cast<double>(n);
    cosines[size(i)] = std::cos(angle), sines[size(i)] = -std::sin(angle);
  }
  double energy = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    const double *cosine = cosines.data(), *sine = sines.data();
    const float *a = x.re.data() + lane, *b = x.im.data() + lane;
    double sum_re = 0.0, sum_im = 0.0;
    for (int64_t j = 0, at = 0; j < n; ++j, a += W, b += W) {
      sum_re += *a * cosine[at] - *b * sine[at];
      sum_im += *a * sine[at] + *b * cosine[at];
      at += at + k < n ? k : k - n;
    }
    re[size(k)] = sum_re, im[size(k)] = sum_im;
    energy += sum_re * sum_re + sum_im * sum_im;
  }
  const bool chirp = largest_prime_factor(n) > Fft::kLargestRadix;
  const double unit = 0x1p-24 * std::log2(static_cast<double>(2 * n)), limit = chirp ? kChirpUnits : kUnits;
  for (const Signal* got : {&forward, &inverse}) {
    double error = 0.0, peak = 0.0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = got == &forward || k == 0 ? k : n - k;
      const double dr = got->re.data()[k * W + lane] - re[size(at)], di = got->im.data()[k * W + lane] - im[size(at)];
      error += dr * dr + di * di;
      if (!(dr * dr + di * di <= peak)) peak = dr * dr + di * di;  // keeps NaN
    }
    const char* direction = got == &forward ? "forward" : "inverse";
    const double units = std::sqrt(error / energy) / unit;
    const double most = std::sqrt(peak * static_cast<double>(n) / energy) / unit / limit;
    CHECK(units <= limit, "length %lld, lane %d, %s: error of %.3g units", static_cast<long long>(n), lane, direction,
          units);
    CHECK(most <= kPeak, "length %lld, lane %d, %s: an element is wrong by %.3g times the limit of the mean",
          static_cast<long long>(n), lane, direction, most);
    double& record = chirp ? worst_chirp : worst;
    if (units > record) record = units;
    if (most > worst_peak) worst_peak = most;
  }
}

// All lanes for short lengths; the last one for long ones, where the sums in double take their time.
void check_length(Random& random, int64_t n) {
  Transform transform(n);
  const Signal x(random, n);
  Signal forward(n), inverse(n), in_place = x, in_place_inverse = x, input = x;
  transform.run(input.planes(), forward.planes());
  transform.run(input.planes().exchanged(), inverse.planes().exchanged());
  CHECK(input == x, "length %lld: the input was written", static_cast<long long>(n));
  transform.run(in_place.planes(), in_place.planes());
  transform.run(in_place_inverse.planes().exchanged(), in_place_inverse.planes().exchanged());
  CHECK(in_place == forward && in_place_inverse == inverse, "length %lld: in place the result is another",
        static_cast<long long>(n));
  CHECK(forward.canaries_live() && inverse.canaries_live(), "length %lld: written beyond the output",
        static_cast<long long>(n));
  for (int lane = n <= 40 ? 0 : W - 1; lane < W; ++lane) check_lane(x, forward, inverse, lane);
}

void every_short_length() {
  Random random{1};
  for (int64_t n = 1; n <= 130; ++n) check_length(random, n);
}

void long_lengths() {
  Random random{2};
  for (int64_t n : {134, 169, 243, 256, 509, 1021, 1024, 2047, 3721, 4096}) check_length(random, n);
  check::note("relative error: at most %.2f of %.2f units, %.2f of %.2f with a chirp; peak %.2f of %.1f", worst, kUnits,
              worst_chirp, kChirpUnits, worst_peak, kPeak);
}

// A lane must see nothing of the others, not even their NaN.
void lanes_are_apart() {
  Random random{3};
  for (int64_t n : {30, 64, 67}) {
    Transform transform(n);
    Signal x(random, n), y(n);
    transform.run(x.planes(), y.planes());
    for (int poisoned = 0; poisoned < W; ++poisoned) {
      Signal z = x;
      z.re.memory[size(n / 2 * W + poisoned)] = z.im.memory[size(n / 2 * W + poisoned)] = kNan;
      transform.run(z.planes(), z.planes());
      for (int64_t i = 0; i < n * W; ++i) {
        const float re = z.re.data()[i], im = z.im.data()[i];
        const bool good =
            i % W == poisoned ? std::isnan(re) && std::isnan(im) : re == y.re.data()[i] && im == y.im.data()[i];
        CHECK(good, "length %lld: lane %lld beside a NaN in lane %d", static_cast<long long>(n),
              static_cast<long long>(i % W), poisoned);
      }
    }
  }
}

// `Transform` itself checks what construction writes.
void tables_of_many_lengths() {
  int count = 0;
  for (int64_t n = 131; n <= 20000; n += n / 24 + 1, ++count) Transform transform(n);
  for (int64_t n : {16384, 17995, 18605, 19683, 19946, 19997, 20000}) {  // 2^14, 5·59·61, 5·61², 3^9, 2·9973, a prime
    const Transform transform(n);
    ++count;
  }
  check::note("%d lengths", count);
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"every short length", every_short_length},
    {"long lengths", long_lengths},
    {"lanes are apart", lanes_are_apart},
    {"tables of many lengths", tables_of_many_lengths},
    {nullptr, nullptr},
};
