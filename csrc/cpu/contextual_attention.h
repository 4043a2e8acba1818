// contextual_attention on the CPU, for both of its ops.
//
// For cells q, k of the grid (rows i, u; columns j, v; L cells), with all sums exact and only reordered:
//
//   Gram matrix     G[q,k]  = ⟨f_q, b_k⟩                        a product of one row of cells with all keys
//   patch scores    A       = Σ over horizontal shifts of G      inside the image
//                   S[q,k]  = Σ over vertical shifts of A / n_k
//   propagation     S1[q,k] = S[q−1,k−1] + S[q,k] + S[q+1,k+1]   in row-major order, lines wrapping around
//                   S2[q,k] = likewise S1 in column-major order
//   weights         P[q,k]  = softmax over usable keys; masked keys are one key with logit 0 and their number as weight
//   pasting         out(2a+α, 2b+β) = ¼ Σ_k (Σ over four shifts of P) · background(2u+α, 2v+β)
//
// Row i of P needs S1 of rows i−1 to i+1, that S of a row more, and that A of yet another: lines
// (contextual_geometry.h) live just long enough. Lines are in row-major order of the keys, so that row-major neighbours
// are shifts by 1 and vertical ones shifts by the width; the wrap of column-major order is written into a line's
// margins.
//
// Attention is nearly one-hot on real features: logits reach thousands. A vector of keys whose weights in a row are all
// below 2⁻³⁰/L of the largest is 0 and never multiplied; all of them together change an output by less than 2⁻³⁰ of
// the largest value.
#pragma once

#include "arena.h"
#include "contextual_geometry.h"
#include "parallel.h"
#include "rows.h"

namespace irt::INPAINTRT_ISA::contextual {

// A sum of three, and what its two additions rounded off (Knuth's two-sum). Logits are ten times a sum of scores and
// decide by their differences, so roundings of scores show in the image; these sums are bound by memory anyway.
struct Sum {
  Vec value, rest;
  Vec rounded() const { return value + rest; }
};
static inline Vec finite_or_zero(Vec x) { return if_positive(x, x, if_at_most_zero(x, x, Vec(0.0f))); }  // NaN: 0
static inline Sum sum_of(Vec a, Vec b, Vec c) {
  const Vec ab = a + b, b1 = ab - a, sum = ab + c, c1 = sum - ab;
  return {sum, finite_or_zero(((a - (ab - b1)) + (b - b1)) + ((ab - (sum - c1)) + (c - c1)))};
}

class Attention {
 public:
  Attention(const Call& call, const Geometry& g, float* space) : call_(call), g_(g) {
    const auto take = [&](int64_t floats) {
      float* at = space;
      space += floats;
      return at;
    };
    keys_ = take(g.key_floats()), values_ = take(4 * g.phase_floats());
    length_ = take(g.line) + g.margin, usable_ = take(g.line) + g.margin;
    not_first_ = take(g.line) + g.margin, not_last_ = take(g.line) + g.margin;
    tables_ = reinterpret_cast<int32_t*>(take(2 * g.line));
    lines_ = take(g.lines() * g.line);
    flags_ = reinterpret_cast<uint8_t*>(take(vectors(g.flag_bytes() / 4 + 1)));
    finished_ = take(2 * g.out_row);
    scratch_ = take(0);
    zero_ = lines_ + kLines * g.list * g.line + g.margin;
    no_flags_ = flags_ + kWeightRows * g.list * g.flags + g.group_pad;
    rows_ = tables_, columns_ = rows_ + call.height, list_ = columns_ + call.width, at_ = list_ + g.list;
    wanted_ = reinterpret_cast<uint8_t*>(at_ + call.width);
  }

  void run() {
    const int64_t h = call_.height, w = call_.width;
    for (int64_t i = 0; i < h; ++i) rows_[i] = static_cast<int32_t>(source_index(i, h, call_.aligned));
    for (int64_t j = 0; j < w; ++j) columns_[j] = static_cast<int32_t>(source_index(j, w, call_.aligned));
    for (float* line : {length_, usable_, not_first_, not_last_}) fill(line - g_.margin, g_.line, 0.0f);
    for (int64_t k = 0; k < g_.cells; ++k) not_first_[k] = k % w > 0, not_last_[k] = k % w < w - 1;
    fill(lines_, g_.lines() * g_.line, 0.0f);
    for (int64_t b = 0; b < call_.batch; ++b) {
      pack(b);
      find_usable(b);
      int64_t low = 0, high = w;
      find_wanted(b, low, high);
      if (call_.queries) clear(b);
      for (int64_t first = low; first < high; first += g_.columns) {
        strip(b, first, least(first + g_.columns, high));
      }
    }
  }

 private:
  const Call& call_;
  const Geometry& g_;
  float *keys_, *values_, *length_, *usable_, *not_first_, *not_last_, *lines_, *finished_, *scratch_;
  const float* zero_;
  const uint8_t* no_flags_;
  uint8_t* flags_;
  int32_t *tables_, *rows_, *columns_, *list_, *at_;  // at_: where a column is in the list, or −1
  uint8_t* wanted_;                                   // rows of cells with an output that is asked for
  int64_t masked_ = 0;                                // keys on the grid of keys that are not usable
  int64_t first_usable_ = 0;
  bool dense_ = false;  // the background is not finite: every product counts, 0 · ∞ too

  // Of the strip: outputs, weights, scores, and how many columns are in the list.
  int64_t out0_ = 0, out1_ = 0, weight0_ = 0, weight1_ = 0, score0_ = 0, score1_ = 0, count_ = 0;

  static void fill(float* at, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) at[i] = value;
  }

  // ---- lines. `row` may lie outside the image: then the line is zeros.

  float* slot(int64_t number, int64_t column) const {
    return lines_ + (number * g_.list + at_[column]) * g_.line + g_.margin;
  }
  bool inside(int64_t row) const { return row >= 0 && row < call_.height; }
  float* sums(int64_t row, int64_t column) const { return slot(row % kSumRows, column); }
  const float* sums_or_zero(int64_t row, int64_t column) const { return inside(row) ? sums(row, column) : zero_; }
  // S1 of a row; row −1 is the last row (for the first), row `height` the first (for the last).
  float* scores(int64_t row, int64_t column) const {
    if (row == call_.height) return slot(kSumRows + kScoreRows, column);
    return slot(kSumRows + (row + kScoreRows) % kScoreRows, column);
  }
  float* weights(int64_t row, int64_t column) const {
    return slot(kSumRows + kScoreRows + 1 + row % kWeightRows, column);
  }
  uint8_t* flags(int64_t row, int64_t column) const {
    return flags_ + (row % kWeightRows * g_.list + at_[column]) * g_.flags + g_.group_pad;
  }

  // body(begin, end, scratch) on pieces of [0, n), each thread with scratch memory of its own.
  template <class Body>
  void parallel(int64_t n, const Body& body) const {
    int next = 0;
    parallel_for(n, 1, g_.threads, [&](int64_t begin, int64_t end) {
      body(begin, end, scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.scratch);
    });
  }

  // ---- once per sample

  // visit(pointer) with the tensor's element at (b, 0, y, x), of whatever dtype.
  template <class Visit>
  static void at(const irt_view& view, int64_t b, int64_t y, int64_t x, const Visit& visit) {
    const int64_t offset = b * view.strides[0] + y * view.strides[2] + x * view.strides[3];
    if (view.dtype == IRT_F32) return visit(static_cast<float*>(view.data) + offset);
    if (view.dtype == IRT_BF16) return visit(static_cast<bf16*>(view.data) + offset);
    visit(static_cast<f16*>(view.data) + offset);
  }

  // Keys as right-hand sides of the Gram product, values of the four phases as those of the pasting products.
  void pack(int64_t b) {
    int odd = 0;
    float* squares = lines_ + g_.margin;  // free until the first row of cells
    parallel(g_.key_blocks, [&](int64_t begin, int64_t end, float*) {
      for (int64_t block = begin; block < end; ++block) pack_keys(b, block, squares);
    });
    parallel(call_.height, [&](int64_t begin, int64_t end, float*) {
      for (int64_t u = begin; u < end; ++u) {
        measure(u, squares);
        if (!pack_values(b, u)) __atomic_store_n(&odd, 1, __ATOMIC_RELAXED);
      }
    });
    dense_ = odd;
  }

  // [panel of keys][channel][key], and |b_k|².
  void pack_keys(int64_t b, int64_t block, float* squares) const {
    const irt_view& x = *call_.background;
    const int64_t first = block * g_.key_rows * call_.width;
    for (int64_t n = 0; n < g_.key_columns; ++n) {
      float* column = keys_ + block * g_.block_floats + n / kPanelColumns * call_.channels * kPanelColumns;
      column += n % kPanelColumns;
      const int64_t k = first + n;
      if (n >= g_.key_rows * call_.width || k >= g_.cells) {  // what fills the last panel
        for (int64_t c = 0; c < call_.channels; ++c) column[c * kPanelColumns] = 0.0f;
        continue;
      }
      at(x, b, rows_[k / call_.width], columns_[k % call_.width], [&](const auto* from) {
        float square = 0.0f;
        for (int64_t c = 0; c < call_.channels; ++c) {
          const float value = to_float(from[c * x.strides[1]]);
          column[c * kPanelColumns] = value;
          square += value * value;
        }
        squares[k] = square;
      });
    }
  }

  // n_k of a row of keys. Scores are divided by it: a factor 1/n_k would round once more.
  void measure(int64_t u, const float* squares) const {
    const int64_t w = call_.width;
    const float patch = static_cast<float>(9 * call_.channels);
    for (int64_t v = 0; v < w; ++v) {
      float sum = 0.0f;
      for (int64_t y = most(0, u - 1); y < least(call_.height, u + 2); ++y) {
        for (int64_t x = most(0, v - 1); x < least(w, v + 2); ++x) sum += squares[y * w + x];
      }
      const float length = std::sqrt(call_.sum ? sum + patch * call_.eps : sum);
      length_[u * w + v] = !call_.sum && length < call_.eps ? call_.eps : length;
    }
  }

  // [phase][panel of channels][key][channel]; returns whether row u's values are finite.
  bool pack_values(int64_t b, int64_t u) const {
    const irt_view& x = *call_.background;
    const int64_t w = call_.width, panel_floats = g_.groups * W * kPanelColumns;
    float sum = 0.0f;
    for (int64_t phase = 0; phase < 4; ++phase) {
      for (int64_t p = 0; p < g_.panels; ++p) {
        float* to = values_ + phase * g_.phase_floats() + p * panel_floats + u * w * kPanelColumns;
        const int64_t c = p * kPanelColumns, some = least(kPanelColumns, call_.channels - c);
        if (some < kPanelColumns) fill(to, w * kPanelColumns, 0.0f);
        at(x, b, 2 * u + phase / 2, phase % 2, [&](const auto* from) {
          for (int64_t i = 0; i < some; ++i) {
            for (int64_t v = 0; v < w; ++v) {
              const float value = to_float(from[(c + i) * x.strides[1] + 2 * v * x.strides[3]]);
              to[v * kPanelColumns + i] = value;
              sum += value * 0.0f;
            }
          }
        });
        if (u == call_.height - 1) fill(to + w * kPanelColumns, (g_.groups * W - g_.cells) * kPanelColumns, 0.0f);
      }
    }
    return sum == 0.0f;
  }

  void clear(int64_t b) const {
    const irt_view& out = *call_.out;
    parallel(call_.channels, [&](int64_t begin, int64_t end, float*) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t y = 0; y < out.sizes[2]; ++y) {
          at(out, b, y, 0, [&](auto* row) {
            for (int64_t x = 0; x < out.sizes[3]; ++x) from_float(0.0f, row[c * out.strides[1] + x * out.strides[3]]);
          });
        }
      }
    });
  }

  // Which keys the softmax sees, and how many it sees as one with logit 0.
  void find_usable(int64_t b) {
    const int64_t h = call_.height, w = call_.width;
    masked_ = 0, first_usable_ = -1;
    for (int64_t u = 0; u < h; ++u) {
      for (int64_t v = 0; v < w; ++v) {
        const bool usable = !call_.mask || !any_set(*call_.mask, b, u, v);
        const bool counts = u % call_.stride == 0 && v % call_.stride == 0;
        if (usable && first_usable_ < 0) first_usable_ = u * w + v;
        usable_[u * w + v] = usable && counts;
        masked_ += !usable && counts && !call_.infinite;
      }
    }
    if (first_usable_ < 0 || call_.infinite) first_usable_ = 0;
  }

  // A cell of the 3×3 around (i, j) is set.
  bool any_set(const irt_view& mask, int64_t b, int64_t i, int64_t j) const {
    for (int64_t y = most(0, i - 1); y < least(call_.height, i + 2); ++y) {
      for (int64_t x = most(0, j - 1); x < least(call_.width, j + 2); ++x) {
        if (is_set(mask, b, y, x)) return true;
      }
    }
    return false;
  }

  // Rows of which outputs are asked for, then those of weights, scores and sums that they need; columns [low, high).
  void find_wanted(int64_t b, int64_t& low, int64_t& high) const {
    const int64_t h = call_.height, w = call_.width;
    uint8_t *outputs = wanted_, *weights = outputs + h, *scores = weights + h, *sums = scores + h;
    const bool all = !call_.queries || call_.offsets;
    memset(outputs, all, static_cast<size_t>(h));
    low = all ? 0 : w, high = all ? w : 0;
    for (int64_t i = 0; i < h && !all; ++i) {
      for (int64_t j = 0; j < w; ++j) {
        if (is_set(*call_.queries, b, i, j)) outputs[i] = 1, low = least(low, j), high = most(high, j + 1);
      }
    }
    const auto widen = [h](const uint8_t* from, uint8_t* to, int64_t reach) {
      for (int64_t i = 0; i < h; ++i) {
        to[i] = 0;
        for (int64_t y = most(0, i - reach); y < least(h, i + reach + 1); ++y) to[i] |= from[y];
      }
    };
    widen(outputs, weights, 1);
    widen(weights, scores, call_.propagate);
    if (call_.propagate) scores[h - 1] |= weights[0], scores[0] |= weights[h - 1];
    widen(scores, sums, 2);
  }
  bool wants_outputs(int64_t i) const { return wanted_[i]; }
  bool wants_weights(int64_t i) const { return wanted_[call_.height + i]; }
  bool wants_scores(int64_t i) const { return wanted_[2 * call_.height + i]; }
  bool wants_sums(int64_t i) const { return wanted_[3 * call_.height + i]; }

  // ---- a strip: columns [first, last) of output

  void strip(int64_t b, int64_t first, int64_t last) {
    const int64_t h = call_.height, w = call_.width, more = call_.propagate;
    out0_ = first, out1_ = last;
    weight0_ = most(0, first - 1), weight1_ = least(w, last + 1);
    score0_ = most(0, weight0_ - more), score1_ = least(w, weight1_ + more);
    count_ = 0;
    for (int64_t j = 0; j < w; ++j) {
      const bool beside = j >= score0_ - 1 - more && j < score1_ + 1 + more;
      const bool wraps = more && ((score0_ == 0 && j >= w - 2) || (score1_ == w && j < 2));
      at_[j] = -1;
      if (beside || wraps) list_[count_] = static_cast<int32_t>(j), at_[j] = static_cast<int32_t>(count_++);
    }
    if (call_.propagate && wants_weights(0)) {  // the first row's neighbour is the last one
      for (int64_t r = most(0, h - 3); r < h; ++r) multiply(b, r);
      score(h - 1, -1);
    }
    for (int64_t t = 0; t <= h + 3; ++t) {
      if (t < h && wants_sums(t)) multiply(b, t);
      if (inside(t - 2) && wants_scores(t - 2)) score(t - 2, t - 2);
      if (inside(t - 3) && wants_weights(t - 3)) weigh(b, t - 3);
      if (t >= 3) paste(b, t - 3);
    }
  }

  // A of row r: products of its cells with all keys, summed over horizontal shifts.
  void multiply(int64_t b, int64_t r) const {
    parallel(g_.key_blocks, [&](int64_t begin, int64_t end, float* queries) {
      float* products = queries + g_.channel_blocks * g_.query_stride + W;
      pack_queries(b, r, queries);
      const int tail = static_cast<int>(call_.channels - (g_.channel_blocks - 1) * W);
      const Blocks a = {queries, g_.query_stride, static_cast<int>(g_.channel_blocks), 1, tail};
      for (int64_t block = begin; block < end; ++block) {
        gemm(a, count_, keys_ + block * g_.block_floats, static_cast<int>(g_.key_columns / kPanelColumns),
             [&](int panel, int64_t row, int v, Vec sums) {
               store(products + row * g_.gram_row + panel * kPanelColumns + v * W, sums);
             });
        const int64_t first = block * g_.key_rows * call_.width;
        const int64_t keys = least(g_.cells - first, g_.key_rows * call_.width);
        for (int64_t n = 0; n < count_; ++n) sum_horizontally(r, n, products + n * g_.gram_row, first, keys);
      }
    });
  }

  void pack_queries(int64_t b, int64_t r, float* queries) const {
    const irt_view& x = *call_.foreground;
    for (int64_t block = 0; block < g_.channel_blocks; ++block) {
      const int64_t some = least(W, call_.channels - block * W);
      for (int64_t n = 0; n < count_; ++n) {
        at(x, b, rows_[r], columns_[list_[n]], [&](const auto* from) {
          const Vec values = Single::across(from + block * W * x.strides[1], some, x.strides[1]);
          store(queries + block * g_.query_stride + n * W, values);
        });
      }
    }
  }

  // Column n of the list; `row` holds its products with keys [first, first + keys), whole rows of them.
  void sum_horizontally(int64_t r, int64_t n, const float* row, int64_t first, int64_t keys) const {
    const int64_t j = list_[n], w = call_.width;
    const bool has_left = n > 0 && list_[n - 1] == j - 1, has_right = n + 1 < count_ && list_[n + 1] == j + 1;
    if ((j > 0 && !has_left) || (j + 1 < w && !has_right)) return;  // only there for its neighbours
    const float* left = has_left ? row - g_.gram_row : zero_;
    const float* right = has_right ? row + g_.gram_row : zero_;
    float* to = sums(r, j) + first;
    const auto at = [&](int64_t k) { return load(row + k) + load(left + k - 1) + load(right + k + 1); };
    int64_t k = 0;
    for (; k + W <= keys; k += W) store(to + k, at(k));
    if (k < keys) store_some(to + k, at(k), keys - k);
    for (int64_t v = 0; v < keys; v += w) {  // the first and last key of a row have one neighbour
      to[v] = row[v] + (w > 1 ? right[v + 1] : 0.0f);
      if (w > 1) to[v + w - 1] = row[v + w - 1] + left[v + w - 2];
    }
  }

  // S1 of row r (S without propagation), into the lines of row `as`.
  void score(int64_t r, int64_t as) const {
    parallel(ceil_div(g_.cells, kSpan), [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t span = begin; span < end; ++span) {
        const int64_t first = span * kSpan, last = least(g_.cells, first + kSpan);
        if (!call_.propagate) {
          for (int64_t j = score0_; j < score1_; ++j) {
            const ScoreLine s = score_line(r, j);
            store_range(scores(as, j), first, last, [&](int64_t k) { return s.score(k).rounded(); });
          }
          continue;
        }
        float* line = scratch + W;  // of column score0 − 1
        for (int64_t j = score0_ - 1; j <= score1_; ++j, line += g_.probe_row) {
          const int64_t row = j < 0 ? r - 1 : j < call_.width ? r : r + 1;
          probe(score_line(row, (j + call_.width) % call_.width), first, last, line);
        }
        line = scratch + W + g_.probe_row;
        for (int64_t j = score0_; j < score1_; ++j, line += g_.probe_row) {
          propagate(line, first, last, scores(as, j));
          if (as == 0) propagate(line, first, last, scores(call_.height, j));
        }
      }
    });
  }

  // to[k] = value(k) for k in [first, last), a vector at a time.
  template <class Value>
  static void store_range(float* to, int64_t first, int64_t last, const Value& value) {
    int64_t k = first;
    for (; k + W <= last; k += W) store(to + k, value(k));
    if (k < last) store_some(to + k, value(k), last - k);
  }

  // S of one cell.
  struct ScoreLine {
    const float *middle, *above, *below, *length;
    int64_t width;

    Sum score(int64_t k) const {
      const Sum sum = sum_of(load(middle + k), load(above + k - width), load(below + k + width));
      const Vec by = load(length + k), quotient = sum.value / by;
      return {quotient, finite_or_zero((fma(Vec(0.0f) - quotient, by, sum.value) + sum.rest) / by)};
    }
  };
  ScoreLine score_line(int64_t r, int64_t j) const {
    const auto line = [&](int64_t row) { return inside(r) && inside(row) ? sums(row, j) : zero_; };
    return {line(r), line(r - 1), line(r + 1), length_, call_.width};
  }

  // Scores of keys [first − 1, last + 1), 0 outside the image: values at `to` (of key `first`), what they lack behind
  // them.
  void probe(const ScoreLine& s, int64_t first, int64_t last, float* to) const {
    float* rest = to + g_.probes;
    const auto put = [&](int64_t k, int64_t n) {
      const Sum sum = k >= 0 && k < g_.cells ? s.score(k) : Sum{Vec(0.0f), Vec(0.0f)};
      store_some(to + k - first, sum.value, n), store_some(rest + k - first, sum.rest, n);
    };
    put(first - 1, 1);
    int64_t k = first;
    for (; k + W <= last; k += W) {
      const Sum sum = s.score(k);
      store(to + k - first, sum.value), store(rest + k - first, sum.rest);
    }
    if (k < last) put(k, last - k);
    put(last, 1);
  }

  // S1 for keys [first, last) from the score lines of a cell and, a row of scratch earlier and later, of its
  // neighbours; and what column-major neighbours find beyond the first and last row of keys: the columns before and
  // after.
  void propagate(const float* line, int64_t first, int64_t last, float* to) const {
    const float *before = line - g_.probe_row - first - 1, *after = line + g_.probe_row - first + 1,
                *own = line - first;
    store_range(to, first, last, [&](int64_t k) {
      const Sum sum = sum_of(load(own + k), load(before + k), load(after + k));
      return sum.value +
             (sum.rest + (load(own + g_.probes + k) + load(before + g_.probes + k) + load(after + g_.probes + k)));
    });
    const int64_t w = call_.width, bottom = g_.cells - w;
    for (int64_t k = most(first, 1); k < least(last, w); ++k) to[g_.cells + k - 1] = to[k];
    for (int64_t k = most(first, bottom); k < least(last, g_.cells - 1); ++k) to[k - bottom - w + 1] = to[k];
  }

  // P of row i.
  void weigh(int64_t b, int64_t i) const {
    parallel(weight1_ - weight0_, [&](int64_t begin, int64_t end, float*) {
      for (int64_t j = weight0_ + begin; j < weight0_ + end; ++j) {
        if (call_.queries && !call_.offsets && !any_set(*call_.queries, b, i, j)) {
          memset(flags(i, j) - g_.group_pad, 0, static_cast<size_t>(g_.flags));
        } else {
          weigh_cell(b, i, j);
        }
      }
    });
  }

  // S1 of the cells whose sum is a cell's S2.
  struct Scores {
    const float *middle, *above, *below;
    int64_t width;

    Vec rounded(int64_t k) const { return load(middle + k) + load(above + k - width) + load(below + k + width); }
    Sum sum(int64_t k) const { return sum_of(load(middle + k), load(above + k - width), load(below + k + width)); }
  };

  Scores scores_around(int64_t i, int64_t j) const {
    Scores s = {scores(i, j), zero_, zero_, call_.width};
    if (!call_.propagate) return s;
    const int64_t up = j - (i == 0), down = j + (i == call_.height - 1);  // the wrap of column-major order
    if (up >= 0) s.above = scores(i - 1, up);
    if (down < call_.width) s.below = scores(i + 1, down);
    return s;
  }

  void weigh_cell(int64_t b, int64_t i, int64_t j) const {
    const Scores s = scores_around(i, j);
    float* line = weights(i, j);
    const Vec scale(call_.scale), none(-INFINITY);
    Vec largest(masked_ ? 0.0f : -INFINITY);
    for (int64_t k = 0; k < g_.cells; k += W) {
      const Vec logit = if_positive(load(usable_ + k), s.rounded(k) * scale, none);
      largest = at_least(largest, logit);
      store(line + k, logit);
    }
    const float top = reduce_max(largest);
    const bool wants_offset = call_.offsets && j >= out0_ && j < out1_;
    const int64_t best = wants_offset ? largest_weight(line, top) : 0;
    const bool finite = normalise(s, line, flags(i, j), top);
    if (wants_offset) write_offset(b, i, j, finite ? best : first_usable_);
  }

  static float reduce_max(Vec x) {
    float lanes[W], largest = -INFINITY;
    store(lanes, x);
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }
  static float reduce_sum(Vec x) {
    float lanes[W], sum = 0.0f;
    store(lanes, x);
    for (float lane : lanes) sum += lane;
    return sum;
  }

  // Logits of a cell to weights, in place, and flags of the vectors that are not 0. Returns whether all are finite.
  bool normalise(const Scores& s, float* line, uint8_t* flags, float top) const {
    const Vec cut(top - 20.8f - std::log(static_cast<float>(g_.cells)));  // 2⁻³⁰ / L
    const Vec scale(call_.scale), minus_top(-top), none(-INFINITY);
    constexpr int64_t kPart = 32;  // vectors summed in one chain: thousands of additions to one number would show
    Vec sum(0.0f), part(0.0f);
    for (int64_t g = 0; g < g_.groups; ++g) {
      flags[g] = any_from(load(line + g * W), cut);
      Vec e(0.0f);
      if (flags[g]) {
        const Sum sum = s.sum(g * W);
        const Vec logit = fma(sum.rest, scale, fma(sum.value, scale, minus_top));
        e = exp(if_positive(load(usable_ + g * W), logit, none));
      }
      store(line + g * W, e);
      part = part + e;
      if (g % kPart == kPart - 1 || g == g_.groups - 1) sum = sum + part, part = Vec(0.0f);
    }
    const float total = reduce_sum(sum) + (masked_ ? static_cast<float>(masked_) * std::exp(-top) : 0.0f);
    if (total != total) {
      for (int64_t k = 0; k < g_.cells; ++k) line[k] = usable_[k] > 0 || call_.infinite ? total : 0.0f;
      memset(flags, 1, static_cast<size_t>(g_.groups));
      return false;
    }
    const Vec factor(1.0f / total);
    for (int64_t g = 0; g < g_.groups; ++g) {
      if (flags[g]) store(line + g * W, load(line + g * W) * factor);
    }
    return true;
  }

  // The first key with the largest weight, given logits; key 0 where all weights underflow, as for zeros.
  int64_t largest_weight(const float* logits, float top) const {
    int64_t best = 0;
    float most = -INFINITY;
    for (int64_t k = 0; k < g_.cells; ++k) {
      if (logits[k] > most) most = logits[k], best = k;
    }
    return most - top < -103.0f ? 0 : best;
  }

  void write_offset(int64_t b, int64_t i, int64_t j, int64_t key) const {
    const irt_view& o = *call_.offsets;
    int32_t* to = static_cast<int32_t*>(o.data) + b * o.strides[0] + i * o.strides[2] + j * o.strides[3];
    to[0] = static_cast<int32_t>(key / call_.width - i);
    to[o.strides[1]] = static_cast<int32_t>(key % call_.width - j);
  }

  // ---- pasting: between rows i − 1 and i of cells lie output rows 2i − 1 (α = 1 of the upper) and 2i (α = 0 of the
  // lower)

  // Weights of a cell; beside the image or outside the rows, zeros.
  struct Line {
    const float* weights;
    const uint8_t* flags;
  };
  Line line(int64_t row, int64_t column) const {
    if (!inside(row) || column < 0 || column >= call_.width) return {zero_, no_flags_};
    return {weights(row, column), flags(row, column)};
  }

  void paste(int64_t b, int64_t i) const {
    const int64_t tiles = ceil_div(out1_ - out0_, kTileRows), tall = ceil_div(out1_ - out0_, tiles);
    const int64_t first = inside(i) && wants_outputs(i) ? 0 : 1, last = inside(i - 1) && wants_outputs(i - 1) ? 2 : 1;
    if (first == last) return;
    parallel((last - first) * 2 * tiles, [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t phase = 2 * first + task / tiles, column = out0_ + task % tiles * tall;
        paste_tile(i, phase, column, static_cast<int>(least(tall, out1_ - column)), scratch);
      }
    });
    parallel((last - first) * g_.channel_blocks, [&](int64_t begin, int64_t end, float*) {
      for (int64_t n = begin; n < end; ++n) {
        finish(b, i, first + n / g_.channel_blocks, n % g_.channel_blocks);
      }
    });
  }

  // `rows` ≤ kTileRows outputs of one phase, from the cell (·, column) on: the four weights that paste there, summed a
  // chunk of keys at a time and only where one is not 0, times the values.
  void paste_tile(int64_t i, int64_t phase, int64_t column, int rows, float* sums) const {
    const int64_t alpha = phase / 2, beta = phase % 2, w = call_.width;
    const int64_t own = i - alpha, other = alpha ? i : i - 1, down = alpha ? w : -w, along = beta ? 1 : -1;
    const float* mask = beta ? not_last_ : not_first_;
    float* to = finished_ + alpha * g_.out_row + (2 * (column - out0_) + beta) * W;
    const float* values = values_ + phase * g_.phase_floats();
    int32_t list[kGroups];
    for (int64_t chunk = 0; chunk < g_.groups; chunk += kGroups) {
      const int64_t groups = least(kGroups, g_.groups - chunk);
      uint8_t used[kTileRows][kGroups], any[kGroups] = {};
      for (int r = 0; r < rows; ++r) {
        const int64_t j = column + r;
        for (int64_t g = 0; g < groups; ++g) used[r][g] = dense_;
        mark(line(own, j), 0, chunk, groups, used[r]);
        mark(line(other, j), down, chunk, groups, used[r]);
        mark(line(own, j + along), along, chunk, groups, used[r]);
        mark(line(other, j + along), down + along, chunk, groups, used[r]);
        for (int64_t g = 0; g < groups; ++g) any[g] |= used[r][g];
      }
      int n = 0;
      for (int64_t g = 0; g < groups; ++g) {
        if (any[g]) list[n++] = static_cast<int32_t>(chunk + g);
      }
      if (n == 0 && chunk > 0) continue;
      for (int r = 0; r < rows; ++r) {
        const int64_t j = column + r;
        const float *a = line(own, j).weights, *b = line(other, j).weights;
        const float *c = line(own, j + along).weights, *d = line(other, j + along).weights;
        for (int m = 0; m < n; ++m) {
          const int64_t k = list[m] * W;
          Vec sum(0.0f);
          if (used[r][list[m] - chunk]) {
            sum =
                fma(load(mask + k), load(c + k + along) + load(d + k + down + along), load(a + k) + load(b + k + down));
          }
          store(sums + (m * rows + r) * W, sum);
        }
      }
      multiply_rows(sums, rows, list, n, values, chunk == 0, to);
    }
  }

  // used |= whether a weight at a distance of `shift` from the groups is not 0.
  static void mark(const Line& line, int64_t shift, int64_t first, int64_t count, uint8_t* used) {
    const uint8_t* low = line.flags + first + floor_div(shift, W);
    const uint8_t* high = line.flags + first + floor_div(shift + W - 1, W);
    for (int64_t g = 0; g < count; ++g) used[g] |= low[g] | high[g];
  }

  void multiply_rows(const float* sums, int rows, const int32_t* list, int n, const float* values, bool first,
                     float* to) const {
    const auto with = [&](auto count) { product<decltype(count)::value>(sums, list, n, values, first, to); };
    switch (rows) {
#if defined(__AVX512F__)
      case 14: return with(Rows<14>());
      case 13: return with(Rows<13>());
      case 12: return with(Rows<12>());
      case 11: return with(Rows<11>());
      case 10: return with(Rows<10>());
      case 9: return with(Rows<9>());
      case 8: return with(Rows<8>());
      case 7: return with(Rows<7>());
#endif
#if defined(__AVX2__)
      case 6: return with(Rows<6>());
      case 5: return with(Rows<5>());
#endif
      case 4: return with(Rows<4>());
      case 3: return with(Rows<3>());
      case 2: return with(Rows<2>());
      default: return with(Rows<1>());
    }
  }
  template <int kCount>
  using Rows = std::integral_constant<int, kCount>;

  // The sums [group][row][key] times the values of those groups of keys, added to what the outputs have unless `first`.
  template <int kRows>
  void product(const float* sums, const int32_t* list, int n, const float* values, bool first, float* to) const {
    for (int64_t panel = 0; panel < g_.panels; ++panel) {
      const float* b = values + panel * g_.groups * W * kPanelColumns;
      float* at = to + panel * kPanelVectors * g_.pixels;
      Vec totals[kRows][kPanelVectors];
      for (int m = 0; m < n; ++m) {
        accumulate<Single, kRows>(sums + m * kRows * W, b + list[m] * W * kPanelColumns, W, totals);
      }
      each<kRows>([&](int r, int v) {
        float* out = at + v * g_.pixels + 2 * r * W;
        store(out, first ? totals[r][v] : load(out) + totals[r][v]);
      });
    }
  }

  // A block of channels of a finished output row: divided, cleared where nobody asks, in the tensor's layout.
  void finish(int64_t b, int64_t i, int64_t alpha, int64_t block) const {
    const int64_t row = i - alpha, y = 2 * row + alpha, count = 2 * (out1_ - out0_);
    float* from = finished_ + alpha * g_.out_row + block * g_.pixels;
    if (call_.queries) {
      for (int64_t p = 0; p < count; ++p) {
        if (!is_set(*call_.queries, b, row, out0_ + p / 2)) store(from + p * W, Vec(0.0f));
      }
    }
    float divisor = 4.0f;
    if (call_.overlap) {
      if (y == 0 || y == 2 * call_.height - 1) divisor = 2.0f;
      if (out0_ == 0) store(from, load(from) * Vec(2.0f));
      if (out1_ == call_.width) store(from + (count - 1) * W, load(from + (count - 1) * W) * Vec(2.0f));
    }
    at(*call_.out, b, y, 2 * out0_, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      const int64_t channel = call_.out->strides[1], first = block * W;
      const Row<T> row = {to + first * channel, least(W, call_.channels - first), channel, call_.out->strides[3]};
      write_row(from, count, Row<T>{}, row, [&](Vec v, Vec) { return v * Vec(1.0f / divisor); });
    });
  }
};

}  // namespace irt::INPAINTRT_ISA::contextual
