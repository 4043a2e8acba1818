// Matrix product on blocked operands, with float sums: the base of the spectral mix and of convolutions.
//
// Everything in these engines is stored in blocks of one vector of channels: element (row, channel) of a matrix lies at
// [channel / W][row][channel % W], W = Vec::kWidth. FFTs and Winograd transforms write this layout with whole vectors;
// here it puts all rows of a tile at constant distances (one cache line), so that the inner loop needs one address for
// A and one for B. The product of a tile of kTileRows rows and one panel of columns stays in registers over all of K:
//
//   for k:  kPanelVectors loads of B, kTileRows broadcasts of A, kTileRows · kPanelVectors FMAs
//
// AVX-512: 14×32 in 28 registers, 16 loads for 28 FMAs. AVX2: 6×16 in 12 registers, 8 loads for 12 FMAs. A tile of A is
// read from L1 for every panel (14 × 384 floats are 21 KB), B streams from L2 at 9 bytes a cycle.
//
// Operands are floats; or anything else that lanes.h can multiply in 32-bit lanes, and then "channel" here means lane.
#pragma once

#include <climits>
#include <cstdint>

#include "lanes.h"

namespace irt::INPAINTRT_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14, kPanelVectors = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kPanelVectors = 2;
#else
constexpr int kTileRows = 4, kPanelVectors = 2;
#endif
constexpr int kPanelColumns = kPanelVectors * Vec::kWidth;
// Channels summed in one chain; chains are then added. A chain's rounding error grows with its length, that of 512
// channels falls to two fifths (and Winograd's products are where its error comes from); the additions cost 2 %.
// Products of pairs, whose factors and results have 8 bits, gain nothing by it: they are one chain.
constexpr int kChain = 64;

// A as read by `gemm`: `groups` blocks of kWidth channels, the last `tails` of them only `tail` channels wide. (Complex
// data has two narrow blocks, of real and imaginary parts; what lies beyond `tail` is never read.)
struct Blocks {
  const float* data;
  int64_t stride;  // floats between groups
  int groups, tails, tail;
};

// One panel of the packed B: [k][kPanelColumns], k over the channels that A has, in A's order.
static inline int64_t panel_floats(const Blocks& a) {
  const int64_t full = a.groups - a.tails;
  return (full * Vec::kWidth + static_cast<int64_t>(a.tails) * a.tail) * kPanelColumns;
}

// sums += the products of `channels` channels at `a`, of kRows rows, with as many rows of a panel at `b`.
template <class Lane, int kRows>
IRT_INLINE void accumulate(const float* a, const float* b, int channels, Vec (&sums)[kRows][kPanelVectors]) {
#pragma GCC unroll 1
  for (int c = 0; c < channels; ++c, b += kPanelColumns) {
    Vec columns[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) columns[v] = load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value(a[r * Vec::kWidth + c]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = Lane::multiply_add(value, columns[v], sums[r][v]);
    }
  }
}

// visit(r, v) for all vectors of a tile.
template <int kRows, class Visit>
IRT_INLINE void each(const Visit& visit) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) visit(r, v);
  }
}

// One of several products that are summed: rows of A and a panel of B.
struct Factors {
  const float *a, *b;
};

// Where a sum of products has come to: group g of product t.
struct Place {
  int64_t t;
  int g;
  Factors factors;
};

// sums += the next chain of a sum of `count` products: as many groups as give it `longest` channels, of one product or
// of several.
template <class Lane, int kRows, class Of>
IRT_INLINE void chain(const Blocks& shape, int64_t count, const Of& factors, int longest, Place& at,
                      Vec (&sums)[kRows][kPanelVectors]) {
  for (int length = 0; length < longest && at.t < count;) {
    const int channels = at.g < shape.groups - shape.tails ? Vec::kWidth : shape.tail;
    accumulate<Lane, kRows>(at.factors.a, at.factors.b, channels, sums);
    at.factors.a += shape.stride, at.factors.b += static_cast<int64_t>(channels) * kPanelColumns;
    length += channels;
    if (++at.g < shape.groups) continue;
    at.g = 0;
    if (++at.t < count) at.factors = factors(at.t);
  }
}

// The sum of `count` products of kRows rows with a panel each, factors(t), whose rows lie as `shape` says (but not
// where); end(row, vector, sums).
template <class Lane, int kRows, class Of, class End>
static inline void sum_of_products(const Blocks& shape, int64_t count, const Of& factors, const End& end) {
  constexpr int kLongest = Lane::kChannels == 1 ? kChain : INT_MAX;
  Place at = {0, 0, factors(0)};
  if (count * (panel_floats(shape) / kPanelColumns) <= kLongest) {
    Vec sums[kRows][kPanelVectors];
    chain<Lane, kRows>(shape, count, factors, INT_MAX, at, sums);
    return each<kRows>([&](int r, int v) { end(r, v, sums[r][v]); });
  }
  Vec totals[kRows][kPanelVectors];
  while (at.t < count) {
    Vec sums[kRows][kPanelVectors];
    chain<Lane, kRows>(shape, count, factors, kLongest, at, sums);
    each<kRows>([&](int r, int v) { totals[r][v] = totals[r][v] + sums[r][v]; });
  }
  each<kRows>([&](int r, int v) { end(r, v, totals[r][v]); });
}

template <int kRows>
struct Height {
  static constexpr int value = kRows;
};

// visit(Height<rows>()), so that tiles are compiled for their height.
template <class Visit>
static inline void with_height(int rows, const Visit& visit) {
  switch (rows) {
#if defined(__AVX512F__)
    case 14: return visit(Height<14>());
    case 13: return visit(Height<13>());
    case 12: return visit(Height<12>());
    case 11: return visit(Height<11>());
    case 10: return visit(Height<10>());
    case 9: return visit(Height<9>());
    case 8: return visit(Height<8>());
    case 7: return visit(Height<7>());
#endif
#if defined(__AVX2__)
    case 6: return visit(Height<6>());
    case 5: return visit(Height<5>());
#endif
    case 4: return visit(Height<4>());
    case 3: return visit(Height<3>());
    case 2: return visit(Height<2>());
    default: return visit(Height<1>());
  }
}

// The height of the next tile where `left` rows are left: the last two tiles share what full tiles leave over, because
// a tile of one or two rows would load all of B for little work.
static inline int tile_height(int64_t left) {
  return static_cast<int>(left <= kTileRows ? left : left < 2 * kTileRows ? (left + 1) / 2 : kTileRows);
}

// end(panel, row, vector, sums) for all rows and all panels of a sum of `count` products, whose panels lie one after
// the other; sums are columns [panel · kPanelColumns + vector · kWidth, … + kWidth) of it in that row.
template <class Lane = Single, class End>
static inline void gemm(const Blocks& shape, const Factors* factors, int64_t count, int64_t rows, int panels,
                        const End& end) {
  const int64_t stride = panel_floats(shape);
  for (int64_t row = 0; row < rows;) {
    const int height = tile_height(rows - row);
    for (int panel = 0; panel < panels; ++panel) {
      with_height(height, [&](auto h) {
        sum_of_products<Lane, decltype(h)::value>(
            shape, count,
            [&](int64_t t) { return Factors{factors[t].a + row * Vec::kWidth, factors[t].b + panel * stride}; },
            [&](int r, int v, Vec sums) { end(panel, row + r, v, sums); });
      });
    }
    row += height;
  }
}

// Likewise, of one product A·B.
template <class Lane = Single, class End>
static inline void gemm(const Blocks& a, int64_t rows, const float* packed, int panels, const End& end) {
  const Factors factors = {a.data, packed};
  gemm<Lane>(a, &factors, 1, rows, panels, end);
}

}  // namespace irt::INPAINTRT_ISA
