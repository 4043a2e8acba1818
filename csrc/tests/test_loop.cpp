// Loop against a plain nest: the same elements, each once, whatever the strides; and as few dimensions as there can be.
// Compiled once per instruction set.
#include "loop.h"

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"

namespace irt::INPAINTRT_ISA {
namespace {

using Offsets = std::array<int64_t, 3>;  // of one element in each operand

struct Layout {
  int ndim;
  int64_t sizes[IRT_MAX_DIMS];
  int64_t strides[3][IRT_MAX_DIMS];
};

Loop<3> loop_of(const Layout& l) { return Loop<3>(l.ndim, l.sizes, {l.strides[0], l.strides[1], l.strides[2]}); }

std::vector<Offsets> naive(const Layout& l) {
  std::vector<Offsets> found;
  int64_t at[IRT_MAX_DIMS] = {};
  for (int d = 0; d < l.ndim; ++d) {
    if (l.sizes[d] == 0) return found;
  }
  while (true) {
    Offsets o{};
    for (int k = 0; k < 3; ++k) {
      for (int d = 0; d < l.ndim; ++d) o[static_cast<size_t>(k)] += at[d] * l.strides[k][d];
    }
    found.push_back(o);
    int d = l.ndim - 1;
    while (d >= 0 && ++at[d] == l.sizes[d]) at[d--] = 0;
    if (d < 0) return found;
  }
}

// Elements [begin, end) of the nest, in the loop's order.
void visit(const Loop<3>& loop, int64_t begin, int64_t end, std::vector<Offsets>& found) {
  const int last = loop.ndim - 1;
  loop.rows(begin, end, [&](const int64_t* at, int64_t count) {
    CHECK(count > 0 && count <= loop.sizes[last], "a row of %lld", static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i) {
      found.push_back(
          {at[0] + i * loop.strides[0][last], at[1] + i * loop.strides[1][last], at[2] + i * loop.strides[2][last]});
    }
  });
}

// Strides of a tensor whose dimensions lie in memory in a random order, perhaps with gaps, perhaps one backwards.
void strides_like_a_tensor(Random& random, const Layout& l, int64_t* strides, bool dense) {
  int order[IRT_MAX_DIMS] = {0, 1, 2, 3, 4, 5};
  for (int d = l.ndim - 1; d > 0; --d) std::swap(order[d], order[random.between(0, d)]);
  int64_t stride = dense ? 1 : random.between(1, 3);
  for (int i = 0; i < l.ndim; ++i) {
    const int d = order[i];
    strides[d] = !dense && random.between(0, 9) == 0 ? -stride : stride;
    stride *= std::max<int64_t>(l.sizes[d], 1);
    if (!dense && random.between(0, 2) == 0) stride += random.between(1, 5);  // a slice of something larger
  }
}

void random_layouts_against_a_nest() {
  Random random{1};
  for (int round = 0; round < 3000; ++round) {
    Layout l{};
    l.ndim = static_cast<int>(random.between(0, IRT_MAX_DIMS));
    for (int d = 0; d < l.ndim; ++d) l.sizes[d] = random.between(0, 40) == 0 ? 0 : random.between(1, 4);
    for (int k = 0; k < 3; ++k) {
      if (k > 0 && random.between(0, 2) == 0) {
        std::copy_n(l.strides[0], IRT_MAX_DIMS, l.strides[k]);  // the same layout: where dimensions merge
      } else {
        strides_like_a_tensor(random, l, l.strides[k], random.between(0, 1) == 0);
      }
      for (int d = 0; k > 0 && d < l.ndim; ++d) {
        if (random.between(0, 5) == 0) l.strides[k][d] = 0;  // expanded
      }
    }
    const Loop<3> loop = loop_of(l);
    std::vector<Offsets> want = naive(l), got, pieces;
    CHECK(loop.total() == static_cast<int64_t>(want.size()), "round %d: %lld elements, not %zu", round,
          static_cast<long long>(loop.total()), want.size());
    CHECK(loop.ndim >= 1 && loop.ndim <= std::max(l.ndim, 1), "round %d: rank %d from %d", round, loop.ndim, l.ndim);
    visit(loop, 0, loop.total(), got);
    for (int64_t begin = 0; begin < loop.total();) {  // as threads share it
      const int64_t end = random.between(begin, loop.total());
      visit(loop, begin, end, pieces);
      begin = end;
    }
    CHECK(got == pieces, "round %d: in pieces the order is another", round);
    std::sort(want.begin(), want.end());
    std::sort(got.begin(), got.end());
    CHECK(got == want, "round %d: other elements than the nest's", round);
  }
}

void dense_layouts_become_one_row() {
  Random random{2};
  for (int round = 0; round < 500; ++round) {
    Layout l{};
    l.ndim = static_cast<int>(random.between(1, IRT_MAX_DIMS));
    for (int d = 0; d < l.ndim; ++d) l.sizes[d] = random.between(1, 5);
    strides_like_a_tensor(random, l, l.strides[0], true);
    for (int k = 1; k < 3; ++k) std::copy_n(l.strides[0], IRT_MAX_DIMS, l.strides[k]);
    const Loop<3> loop = loop_of(l);
    CHECK(loop.ndim == 1 && loop.unit(0) && loop.unit(1) && loop.unit(2), "round %d: rank %d", round, loop.ndim);
  }
}

// The rows that gated_activation counts on: all channels and pixels of a sample in NCHW, a pixel's channels in NHWC.
void halves_of_channels_become_long_rows() {
  const int64_t b = 2, c = 6, h = 5, w = 7;
  const int64_t sizes[] = {b, c, h, w};
  const int64_t nchw[] = {c * h * w, h * w, w, 1}, twice_nchw[] = {2 * c * h * w, h * w, w, 1};
  const int64_t nhwc[] = {c * h * w, 1, w * c, c}, twice_nhwc[] = {2 * c * h * w, 1, 2 * w * c, 2 * c};
  const Loop<2> first(4, sizes, {nchw, twice_nchw}), last(4, sizes, {nhwc, twice_nhwc});
  CHECK(first.ndim == 2 && first.sizes[1] == c * h * w && first.unit(0) && first.unit(1), "NCHW: rank %d", first.ndim);
  CHECK(last.ndim == 2 && last.sizes[1] == c && last.unit(0) && last.unit(1), "NHWC: rank %d", last.ndim);
  const Loop<2> mixed(4, sizes, {nchw, twice_nhwc});
  CHECK(mixed.unit(0) && !mixed.unit(1), "mixed: rows follow the output");
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"random layouts against a nest", random_layouts_against_a_nest},
    {"dense layouts become one row", dense_layouts_become_one_row},
    {"halves of channels become long rows", halves_of_channels_become_long_rows},
    {nullptr, nullptr},
};
