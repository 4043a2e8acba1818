// gemm.h against double: every height of a tile, every kind of narrow block, and nothing read that is not the matrix.
// Compiled once per instruction set.
//
// The bound of an element is that of any sum of K products in float, whatever the order: γ_K·Σ|a||b| with
// γ_K = K·u/(1 − K·u), u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
#include "gemm.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int W = Vec::kWidth;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostRows = 3 * kTileRows + 1;

// A in blocks and B in panels, as `gemm` reads them, in memory that ends where they end; NaN wherever it must not read:
// beyond `tail` in narrow blocks, and in the rows between `rows` and the stride.
struct Problem {
  int64_t rows, stride, k;
  int groups, tails, tail, panels;
  std::vector<float> a, b;

  Problem(Random& random, int64_t some_rows, int all_groups, int narrow, int width, int some_panels, int64_t gap)
      : rows(some_rows), stride(some_rows + gap), groups(all_groups), tails(narrow), tail(width), panels(some_panels) {
    k = int64_t{groups - tails} * W + int64_t{tails} * tail;
    a.assign(size(((groups - 1) * stride + rows - 1) * W + width_of(groups - 1)), kNan);
    b.resize(size(k * panels * kPanelColumns));
    for (int g = 0; g < groups; ++g) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int c = 0; c < width_of(g); ++c) a[size((g * stride + row) * W + c)] = number(random);
      }
    }
    for (float& x : b) x = number(random);
  }

  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  static float number(Random& random) { return static_cast<float>(random.between(-0xffffff, 0xffffff)) * 0x1p-24f; }
  int width_of(int group) const { return group < groups - tails ? W : tail; }
  Blocks blocks() const { return {a.data(), stride * W, groups, tails, tail}; }
  int64_t columns() const { return int64_t{panels} * kPanelColumns; }
};

// The product as rows × columns; every element must be handed over exactly once. `first` rows are left out.
std::vector<float> product(const Problem& p, int64_t first = 0) {
  const int64_t columns = p.columns(), rows = p.rows - first;
  std::vector<float> out(Problem::size(rows * columns), kNan);
  std::vector<int> times(Problem::size(rows * p.panels * kPanelVectors), 0);
  Blocks blocks = p.blocks();
  blocks.data += first * W;
  gemm(blocks, rows, p.b.data(), p.panels, [&](int panel, int64_t row, int v, Vec sums) {
    const bool inside = panel >= 0 && panel < p.panels && row >= 0 && row < rows && v >= 0 && v < kPanelVectors;
    CHECK(inside, "panel %d, row %lld, vector %d", panel, static_cast<long long>(row), v);
    if (!inside) return;
    ++times[Problem::size((row * p.panels + panel) * kPanelVectors + v)];
    store(out.data() + row * columns + panel * kPanelColumns + v * W, sums);
  });
  for (size_t i = 0; i < times.size(); ++i) CHECK(times[i] == 1, "part %zu was given %d times", i, times[i]);
  return out;
}

double largest = 0.0;  // error in units of its bound

void check_against_double(const Problem& p, const std::vector<float>& got) {
  const double u = 0x1p-24 * static_cast<double>(p.k), gamma = u / (1.0 - u);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t column = 0; column < p.columns(); ++column) {
      const float* b = p.b.data() + column / kPanelColumns * p.k * kPanelColumns + column % kPanelColumns;
      double want = 0.0, magnitude = 0.0;
      for (int g = 0; g < p.groups; ++g) {
        for (int c = 0; c < p.width_of(g); ++c, b += kPanelColumns) {
          const double term = static_cast<double>(p.a[Problem::size((g * p.stride + row) * W + c)]) * *b;
          want += term;
          magnitude += std::fabs(term);
        }
      }
      const double value = got[Problem::size(row * p.columns() + column)];
      const double error = std::fabs(value - want), bound = gamma * magnitude;
      CHECK(error <= bound, "rows %lld, groups %d, tails %d of %d, panels %d: (%lld, %lld) is %.9g, not %.9g",
            static_cast<long long>(p.rows), p.groups, p.tails, p.tail, p.panels, static_cast<long long>(row),
            static_cast<long long>(column), value, want);
      if (error > largest * bound) largest = error / bound;
    }
  }
}

// Bits, so that 0 and −0 differ.
bool same(const float* a, const float* b, int64_t n) { return !memcmp(a, b, static_cast<size_t>(n) * sizeof *a); }

void check_problem(const Problem& p) {
  const std::vector<float> once = product(p), again = product(p);
  check_against_double(p, once);
  CHECK(same(once.data(), again.data(), p.rows * p.columns()), "the same product twice gives other bits");
}

// All heights of tiles that `gemm` cuts, with one wide, one narrow, and two narrow (complex) blocks at the end.
void every_number_of_rows() {
  Random random{1};
  for (int64_t rows = 1; rows <= kMostRows; ++rows) {
    check_problem(Problem(random, rows, 2, 0, 0, 1, 1));
    check_problem(Problem(random, rows, 3, 1, (W + 1) / 2, 2, rows % 3));
    check_problem(Problem(random, rows, 4, 2, W > 3 ? 3 : 1, 1, 2));
  }
  check::note("error at most %.2f of its bound", largest);
}

void every_width_of_the_last_blocks() {
  Random random{2};
  for (int tail = 1; tail <= W; ++tail) {
    for (int tails = 1; tails <= 2; ++tails) {
      for (int full : {0, 1, 2, 5}) {
        check_problem(Problem(random, kTileRows + 1, tails + full, tails, tail, 1 + full % 3, full % 2));
      }
    }
  }
}

// Sums of several chains, which may end anywhere in the narrow blocks; and as long as those of LaMa's mix.
void long_sums() {
  Random random{3};
  constexpr int kGroups = kChain / W;
  for (int groups = kGroups - 1; groups <= 2 * kGroups + 3; groups += kGroups > 16 ? 7 : 1) {
    for (int tails = 0; tails <= 2; ++tails) {
      if (groups >= tails) check_problem(Problem(random, kTileRows + 2, groups, tails, (W + 1) / 2, 1, 1));
    }
  }
  for (int k : {180, 384, 1153})
    check_problem(Problem(random, kTileRows + 2, (k + W - 1) / W, 1, (k - 1) % W + 1, 3, 1));
}

// Callers share rows among threads as they like: the bits of a row must not depend on its neighbours.
void a_row_does_not_depend_on_the_others() {
  Random random{4};
  const Problem p(random, kMostRows, 5, 2, (W + 1) / 2, 2, 1);
  const std::vector<float> all = product(p);
  for (int64_t first = 1; first < p.rows; ++first) {
    const std::vector<float> rest = product(p, first);
    CHECK(same(all.data() + first * p.columns(), rest.data(), (p.rows - first) * p.columns()),
          "without the first %lld rows the rest has other bits", static_cast<long long>(first));
  }
}

// Tiles cover the rows, each is compiled for its own height, and none is low while there are rows for two halves.
void heights_of_tiles() {
  for (int64_t left = 1; left <= 5 * kTileRows; ++left) {
    const int height = tile_height(left);
    CHECK(height >= 1 && height <= kTileRows && height <= left, "%d of %lld rows", height,
          static_cast<long long>(left));
    CHECK(left <= kTileRows ? height == left : 2 * height >= kTileRows, "%d of %lld rows", height,
          static_cast<long long>(left));
    int compiled = 0;
    with_height(height, [&](auto h) { compiled = decltype(h)::value; });
    CHECK(compiled == height, "a tile of %d rows is compiled for %d", height, compiled);
  }
}

void nothing_to_do() {
  const float number = 1.0f;
  const Blocks a = {&number, W, 1, 1, 1};
  gemm(a, 0, nullptr, 3, [](int, int64_t, int, Vec) { CHECK(false, "a result of no rows"); });
  gemm(a, 1, nullptr, 0, [](int, int64_t, int, Vec) { CHECK(false, "a result of no columns"); });
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"every number of rows", every_number_of_rows},
    {"every width of the last blocks", every_width_of_the_last_blocks},
    {"long sums", long_sums},
    {"a row does not depend on the others", a_row_does_not_depend_on_the_others},
    {"heights of tiles", heights_of_tiles},
    {"nothing to do", nothing_to_do},
    {nullptr, nullptr},
};
