// window_attention on the CPU: softmax attention inside (shifted) windows, by addresses instead of rolled, cut copies.
//
// One window and head at a time, so that its keys, values and scores stay in the cache. Lanes are queries: a panel of
// kPanelColumns queries is transposed once, and then scores, their maximum, exponentials and sums need no operation
// across lanes, a mask is one number per key, and any number of keys costs no padding.
//
//   S[key][query]       = Σ_c K[key][c] · Q[c][query] + addends      tiles of gemm.h, rows are keys
//   out[channel][query] = Σ_key V[key][channel] · exp(S − max)       in chunks of keys, rows are channels
//
// What the addends are decides the way a window is computed:
//   plain   one region, and the mask the same everywhere (all valid, or none): a constant cancels, no addends at all.
//   sparse  per region of queries only the keys whose addend is the best of that region, or close to it. A key that is
//           left out has at least `gap` less; by Cauchy and Schwarz logits differ by no more than
//           2·|scale|·max|q|·max|k|, so the weights of all of them together are below e^(2·|scale|·|q|·|k| − gap)·N of
//           the largest. They are left out where that, times the norm of all values over that of the values used, is
//           below 2⁻²⁴: float32 would not show them. The norms are those of the window's own data, and one that is not
//           finite forbids it.
//   exact   everything else, and all calls with a bias: all keys, all addends, added in the order of the definition.
#include "arena.h"
#include "gemm.h"
#include "kernel.h"
#include "parallel.h"
#include "sizes.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t P = kPanelColumns;
constexpr int64_t kKeys = 64;  // whose values are added up in one chain
constexpr int kMostRegions = 4;
constexpr double kNegligible = 16.7;  // ln 2²⁴

struct Arguments {
  const irt_view *q, *k, *v, *mask, *bias, *out;  // mask and bias may be null
  int64_t size, heads, shift;
  float scale, mask_value;
  int threads;
};

// The tensor's elements as floats, whatever they are. For masks and biases, which are few.
float element(const irt_view& x, int64_t at) {
  if (x.dtype == IRT_F32) return static_cast<const float*>(x.data)[at];
  if (x.dtype == IRT_BF16) return to_float(static_cast<const bf16*>(x.data)[at]);
  return to_float(static_cast<const f16*>(x.data)[at]);
}

// The largest tile height of gemm.h that divides `rows` evenly enough.
int64_t even_height(int64_t rows) { return ceil_div(rows, ceil_div(rows, kTileRows)); }

// ---- geometry, the same for all windows
// ------------------------------------------------------------------------------

struct Geometry {
  int64_t tokens, channels, groups;             // of a window; of a head; vectors of channels
  int64_t down, across, batch;                  // windows
  int64_t padded;                               // tokens, as whole panels
  int64_t keys, values, queries, scores, sums;  // floats of the buffers
  int64_t scratch, table;                       // floats per thread; of the transposed bias

  explicit Geometry(const Arguments& a) {
    tokens = a.size * a.size;
    channels = a.q->sizes[3] / a.heads;
    groups = ceil_div(channels, W);
    batch = a.q->sizes[0], down = a.q->sizes[1] / a.size, across = a.q->sizes[2] / a.size;
    padded = ceil_div(tokens, P) * P;
    keys = values = groups * W * tokens;
    queries = groups * W * P, sums = groups * W * P, scores = tokens * P;
    scratch = vectors(keys) + vectors(values) + vectors(queries) + vectors(sums) + vectors(scores);
    scratch += vectors((1 + kMostRegions) * padded);  // addends: of the mask; of the keys in use
    scratch += vectors(4 * 2 * tokens) + vectors((2 + kMostRegions) * padded);  // offsets; lists and regions
    table = a.bias ? a.heads * tokens * padded : 0;
  }
  int64_t windows() const { return batch * down * across; }
};

// ---- what a window is
// -------------------------------------------------------------------------------------------------

// The tokens of one region of a window as queries, and the keys that count for them.
struct Region {
  int64_t y0, y1, x0, x1;  // in the window
  int64_t keys;            // in the list
  bool level;              // their addends are equal, so they cancel
  double gap;              // between the best addend and that of any other key; infinite if there is none
  int32_t* list;
  float* addends;  // of the keys in the list, relative to the best

  bool holds(int64_t y, int64_t x) const { return y >= y0 && y < y1 && x >= x0 && x < x1; }
};

enum class Way { plain, sparse, exact };

// Offsets of q, k, v and the output.
enum { kQ, kK, kV, kOut, kTensors };

struct Window {
  int64_t b = -1;
  int regions = 0;
  Way way = Way::plain;
  bool masked = false;         // the mask adds something that does not cancel
  int64_t* offsets[kTensors];  // of the tokens
  float* added;                // by the mask, per token
  int32_t *all, *region_of;    // 0, 1, 2 …; the region of a token
  Region region[kMostRegions];

  void find(const Arguments& a, const Geometry& g, int64_t index) {
    b = index / (g.down * g.across);
    const int64_t wy = index / g.across % g.down, wx = index % g.across;
    const int64_t height = g.down * a.size, width = g.across * a.size;
    const irt_view* views[] = {a.q, a.k, a.v, a.out};
    bool finite = true, uniform = true;
    for (int64_t y = 0, t = 0; y < a.size; ++y) {
      const int64_t row = (wy * a.size + y + a.shift) % height;
      for (int64_t x = 0; x < a.size; ++x, ++t) {
        const int64_t column = (wx * a.size + x + a.shift) % width;
        for (int i = 0; i < kTensors; ++i) {
          offsets[i][t] = b * views[i]->strides[0] + row * views[i]->strides[1] + column * views[i]->strides[2];
        }
        if (!a.mask) continue;
        const int64_t* strides = a.mask->strides;
        const int64_t image = a.mask->sizes[0] == 1 ? 0 : b;
        const float m = element(*a.mask, image * strides[0] + row * strides[1] + column * strides[2]);
        added[t] = m == 1.0f ? 0.0f : m == 0.0f ? a.mask_value : m;
        finite &= std::isfinite(added[t]);
        uniform &= added[t] == added[0];
      }
    }
    masked = a.mask && !(finite && uniform);
    split(a, wy == g.down - 1, wx == g.across - 1);
    way = a.bias ? Way::exact : regions == 1 && !masked ? Way::plain : finite ? Way::sparse : Way::exact;
    if (way == Way::sparse) choose_keys(a);
  }

 private:
  // A shift cuts the windows of the last row and column into what came from the end of the map and from its beginning.
  void split(const Arguments& a, bool last_row, bool last_column) {
    const int64_t cut = a.size - a.shift;
    const int64_t ys[] = {0, last_row && a.shift ? cut : a.size, a.size};
    const int64_t xs[] = {0, last_column && a.shift ? cut : a.size, a.size};
    regions = 0;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        Region& r = region[regions];
        r.y0 = ys[i], r.y1 = ys[i + 1], r.x0 = xs[j], r.x1 = xs[j + 1];
        if (r.y0 == r.y1 || r.x0 == r.x1) continue;
        for (int64_t y = r.y0; y < r.y1; ++y) {
          for (int64_t x = r.x0; x < r.x1; ++x) region_of[y * a.size + x] = regions;
        }
        ++regions;
      }
    }
  }

  // Keys within half a mask_value of the best are used; which others are not, `gap` decides for each head.
  void choose_keys(const Arguments& a) {
    const int64_t tokens = a.size * a.size;
    const double value = a.mask_value;
    for (int i = 0; i < regions; ++i) {
      Region& r = region[i];
      const auto addend = [&](int64_t j) {
        return (region_of[j] == i ? 0.0 : value) + (masked ? static_cast<double>(added[j]) : 0.0);
      };
      double best = addend(0);
      for (int64_t j = 1; j < tokens; ++j) best = addend(j) > best ? addend(j) : best;
      const double worst = best - std::fabs(value) / 2.0;
      r.keys = 0, r.level = true, r.gap = INFINITY;
      for (int64_t j = 0; j < tokens; ++j) {
        const double one = addend(j), less = best - one;
        if (one < worst) {
          r.gap = less < r.gap ? less : r.gap;
          continue;
        }
        r.level &= less == 0.0;
        r.addends[r.keys] = static_cast<float>(-less);
        r.list[r.keys++] = static_cast<int32_t>(j);
      }
    }
  }
};

// ---- attention of one window and head
// ---------------------------------------------------------------------------------

template <class T>
class Attention {
 public:
  Attention(const Arguments& a, const Geometry& g, const float* table, float* space) : a_(a), g_(g), table_(table) {
    const auto take = [&](int64_t floats) {
      float* at = space;
      space += vectors(floats);
      return at;
    };
    keys_ = take(g.keys), values_ = take(g.values), queries_ = take(g.queries), sums_ = take(g.sums);
    scores_ = take(g.scores);
    float* addends = take((1 + kMostRegions) * g.padded);
    auto* offsets = reinterpret_cast<int64_t*>(take(4 * 2 * g.tokens));
    auto* lists = reinterpret_cast<int32_t*>(take((2 + kMostRegions) * g.padded));
    window_.added = addends;
    window_.all = lists, window_.region_of = lists + g.padded;
    for (int i = 0; i < kTensors; ++i) window_.offsets[i] = offsets + i * g.tokens;
    for (int i = 0; i < kMostRegions; ++i) {
      window_.region[i].list = lists + (2 + i) * g.padded;
      window_.region[i].addends = addends + (1 + i) * g.padded;
    }
    for (int64_t t = 0; t < g.tokens; ++t) window_.all[t] = static_cast<int32_t>(t);
    step_[kQ] = a.q->strides[3], step_[kK] = a.k->strides[3], step_[kV] = a.v->strides[3];
    step_[kOut] = a.out->strides[3];
  }

  void enter(int64_t window) { window_.find(a_, g_, window); }

  void attend(int64_t head) {
    head_ = head;
    const irt_view* views[] = {a_.q, a_.k, a_.v, a_.out};
    for (int i = 0; i < kTensors; ++i) data_[i] = static_cast<T*>(views[i]->data) + head * g_.channels * step_[i];
    if (window_.way == Way::sparse && negligible()) {
      for (int i = 0; i < window_.regions; ++i) sparse(window_.region[i]);
      return;
    }
    pack(window_.all, g_.tokens);
    for (int64_t first = 0; first < g_.tokens; first += P) {
      const int64_t n = least(P, g_.tokens - first);
      const auto token = [&](int64_t i) { return first + i; };
      take_queries(n, token);
      if (window_.way == Way::plain) {
        weigh(g_.tokens, [](int64_t, int, Vec s) { return s; });
      } else {
        exact(first, n);
      }
      give(n, token);
    }
  }

 private:
  const Arguments& a_;
  const Geometry& g_;
  const float* table_;
  float *keys_, *values_, *queries_, *sums_, *scores_;
  Window window_;
  int64_t head_ = 0, step_[kTensors];
  T* data_[kTensors];  // the head's first channel
  Vec inverse_[kPanelVectors];

  T* token(int tensor, int64_t t) const { return data_[tensor] + window_.offsets[tensor][t]; }
  int64_t width(int64_t group) const { return least(W, g_.channels - group * W); }
  Vec read(int tensor, int64_t t, int64_t group) const {
    return Single::across(token(tensor, t) + group * W * step_[tensor], width(group), step_[tensor]);
  }

  // ---- whether keys may be left out

  // The largest |x|² of the window's tokens; NaN or infinite if one of them is.
  float largest(int tensor) const {
    Vec best(0.0f), total(0.0f);
    for (int64_t first = 0; first < g_.tokens; first += W) {
      Vec squares[W];
      for (int64_t i = 0; i < least(W, g_.tokens - first); ++i) {
        for (int64_t group = 0; group < g_.groups; ++group) {
          const Vec x = read(tensor, first + i, group);
          squares[i] = fma(x, x, squares[i]);
        }
      }
      transpose(squares);
      Vec sum = squares[0];
      for (int64_t i = 1; i < W; ++i) sum = sum + squares[i];
      best = at_least(best, sum);
      total = total + sum;  // keeps a NaN that a later maximum may lose
    }
    float lanes[W], sum = 0.0f, most_of_all = 0.0f;
    store(lanes, total);
    for (const float x : lanes) sum += x;
    store(lanes, best);
    for (const float x : lanes) most_of_all = x > most_of_all ? x : most_of_all;
    return std::isfinite(sum) ? most_of_all : sum;
  }
  // Σ|v|² of the tokens in a list.
  float values_squared(const int32_t* list, int64_t n) const {
    Vec squares(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t group = 0; group < g_.groups; ++group) {
        const Vec x = read(kV, list[i], group);
        squares = fma(x, x, squares);
      }
    }
    float lanes[W], sum = 0.0f;
    store(lanes, squares);
    for (const float x : lanes) sum += x;
    return sum;
  }
  bool negligible() const {
    double gap = INFINITY;
    for (int i = 0; i < window_.regions; ++i) gap = window_.region[i].gap < gap ? window_.region[i].gap : gap;
    if (gap == INFINITY) return true;  // nothing is left out
    const double norms = std::sqrt(static_cast<double>(largest(kQ)) * static_cast<double>(largest(kK)));
    const double spread = 2.0 * std::fabs(static_cast<double>(a_.scale)) * norms;
    const double room = gap - spread - kNegligible - std::log(static_cast<double>(g_.tokens));
    if (!(room > 0.0)) return false;
    const double all = values_squared(window_.all, g_.tokens);
    for (int i = 0; i < window_.regions; ++i) {
      const double used = values_squared(window_.region[i].list, window_.region[i].keys);
      if (!(all <= used * std::exp(2.0 * least(static_cast<int64_t>(room), 300)))) return false;
      if (!(used > 0.0) || !std::isfinite(all)) return false;
    }
    return true;
  }

  // ---- the three ways

  void sparse(const Region& r) {
    pack(r.list, r.keys);
    const int64_t across = r.x1 - r.x0, count = (r.y1 - r.y0) * across;
    for (int64_t first = 0; first < count; first += P) {
      const int64_t n = least(P, count - first);
      const auto token = [&](int64_t i) {
        return (r.y0 + (first + i) / across) * a_.size + r.x0 + (first + i) % across;
      };
      take_queries(n, token);
      if (r.level) {
        weigh(r.keys, [](int64_t, int, Vec s) { return s; });
      } else {
        weigh(r.keys, [&](int64_t key, int, Vec s) { return s + Vec(r.addends[key]); });
      }
      give(n, token);
    }
  }

  void exact(int64_t first, int64_t n) {
    // What a key of some region adds for the queries of this panel.
    float across[kMostRegions][P] = {};
    for (int i = 0; i < window_.regions; ++i) {
      for (int64_t t = 0; t < n; ++t) across[i][t] = window_.region_of[first + t] == i ? 0.0f : a_.mask_value;
    }
    const float* bias = table_ ? table_ + head_ * g_.tokens * g_.padded + first : nullptr;
    const bool seams = window_.regions > 1;
    weigh(g_.tokens, [&](int64_t key, int v, Vec s) {
      if (bias) s = s + load(bias + key * g_.padded + v * W);
      if (seams) s = s + load(across[window_.region_of[key]] + v * W);
      if (window_.masked) s = s + Vec(window_.added[key]);
      return s;
    });
  }

  // ---- steps

  // Keys as rows of gemm.h, values as [key][channel].
  void pack(const int32_t* list, int64_t n) {
    for (int64_t group = 0; group < g_.groups; ++group) {
      for (int64_t i = 0; i < n; ++i) {
        store(keys_ + (group * n + i) * W, read(kK, list[i], group));
        store(values_ + (i * g_.groups + group) * W, read(kV, list[i], group));
      }
    }
  }

  // Queries token(0) … token(n − 1), times the scale, as a panel [channel][query]; what fills the panel is 0.
  template <class Token>
  void take_queries(int64_t n, const Token& token) {
    const Vec scale(a_.scale);
    for (int64_t group = 0; group < g_.groups; ++group) {
      for (int64_t first = 0; first < P; first += W) {
        Vec rows[W];
        for (int64_t i = 0; i < least(W, n - first); ++i) rows[i] = read(kQ, token(first + i), group) * scale;
        transpose(rows);
        for (int64_t c = 0; c < width(group); ++c) store(queries_ + (group * W + c) * P + first, rows[c]);
      }
    }
  }

  // From the panel and `n` packed keys and values: sums_ and inverse_. add(key, vector, scores) adds the addends.
  template <class Add>
  void weigh(int64_t n, const Add& add) {
    const Blocks keys = {keys_, n * W, static_cast<int>(g_.groups), 1, static_cast<int>(width(g_.groups - 1))};
    Vec top[kPanelVectors], sums[kPanelVectors];
    for (Vec& t : top) t = Vec(-INFINITY);
    const int64_t height = even_height(n);
    for (int64_t row = 0; row < n; row += height) {
      with_height(static_cast<int>(least(height, n - row)), [&](auto h) {
        tile_product<Single, decltype(h)::value>(keys, row, queries_, [&](int64_t key, int v, Vec s) {
          s = add(key, v, s);
          store(scores_ + key * P + v * W, s);
          top[v] = at_least(top[v], s);
        });
      });
    }
    for (int64_t first = 0; first < n; first += kKeys) {
      const int64_t count = least(kKeys, n - first);
      float* scores = scores_ + first * P;
      Vec chunk[kPanelVectors];
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < kPanelVectors; ++v) {
          const Vec e = exp(load(scores + i * P + v * W) - top[v]);
          store(scores + i * P + v * W, e);
          chunk[v] = chunk[v] + e;
        }
      }
      for (int v = 0; v < kPanelVectors; ++v) sums[v] = sums[v] + chunk[v];
      const int64_t channels = even_height(g_.channels);
      for (int64_t c = 0; c < g_.channels; c += channels) {
        with_height(static_cast<int>(least(channels, g_.channels - c)), [&](auto h) {
          add_values<decltype(h)::value>(values_ + first * g_.groups * W + c, scores, count, sums_ + c * P, first == 0);
        });
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) inverse_[v] = Vec(1.0f) / sums[v];
  }

  // out = (what it was, unless first) + Σ values · weights, of kRows channels.
  template <int kRows>
  void add_values(const float* values, const float* weights, int64_t keys, float* out, bool first) const {
    Vec sums[kRows][kPanelVectors];
    const int64_t step = g_.groups * W;
#pragma GCC unroll 1
    for (int64_t i = 0; i < keys; ++i, values += step, weights += P) {
      Vec columns[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) columns[v] = load(weights + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value(values[r]);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = fma(value, columns[v], sums[r][v]);
      }
    }
    each<kRows>([&](int r, int v) {
      float* at = out + r * P + v * W;
      store(at, first ? sums[r][v] : load(at) + sums[r][v]);
    });
  }

  // The panel's results, divided, to their tokens.
  template <class Token>
  void give(int64_t n, const Token& token) {
    for (int64_t group = 0; group < g_.groups; ++group) {
      for (int v = 0; v * W < n; ++v) {
        Vec rows[W];
        for (int64_t c = 0; c < width(group); ++c) {
          rows[c] = load(sums_ + (group * W + c) * P + v * W) * inverse_[v];
        }
        transpose(rows);
        for (int64_t i = 0; i < least(W, n - v * W); ++i) {
          T* to = this->token(kOut, token(v * W + i)) + group * W * step_[kOut];
          if (width(group) == W && step_[kOut] == 1) {
            store(to, rows[i]);
          } else {
            store_some(to, rows[i], width(group), step_[kOut]);
          }
        }
      }
    }
  }
};

// [head][key][query], queries padded to whole panels with 0.
void transpose_bias(const Arguments& a, const Geometry& g, float* table) {
  parallel_for(a.heads * g.tokens, 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* strides = a.bias->strides;
      const int64_t from = row / g.tokens * strides[0] + row % g.tokens * strides[2];
      float* to = table + row * g.padded;
      for (int64_t i = 0; i < g.padded; ++i) to[i] = i < g.tokens ? element(*a.bias, from + i * strides[1]) : 0.0f;
    }
  });
}

template <class T>
void run(const Arguments& a, irt_status& status) {
  const Geometry g(a);
  if (g.windows() == 0) return;  // pointers may be null
  // A thread takes the next window when it has finished one, because masks make them differ; or the next head, where
  // there are few windows.
  const int64_t together = g.windows() >= 4 * a.threads ? a.heads : 1, units = g.windows() * a.heads / together;
  const int64_t workers = most(1, least(a.threads, units));
  const int64_t floats = vectors(g.table) + workers * g.scratch;
  const Workspace space(static_cast<size_t>(floats) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the windows' keys, values and scores");
  auto* table = static_cast<float*>(space.data());
  if (a.bias) transpose_bias(a, g, table);
  int64_t next = 0;
  parallel_for(workers, 1, a.threads, [&](int64_t begin, int64_t) {
    Attention<T> attention(a, g, a.bias ? table : nullptr, table + vectors(g.table) + begin * g.scratch);
    int64_t entered = -1;
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit >= units) return;
      const int64_t window = unit * together / a.heads;
      if (window != entered) attention.enter(entered = window);
      const int64_t head = unit * together % a.heads;
      for (int64_t h = head; h < head + together; ++h) attention.attend(h);
    }
  });
}

// ---- the call
// ---------------------------------------------------------------------------------------------------------

bool has_sizes(const irt_view& x, int ndim, const int64_t* sizes) {
  return x.ndim == ndim && !memcmp(x.sizes, sizes, static_cast<size_t>(ndim) * sizeof sizes[0]);
}

// An optional tensor of q's dtype or float32; false if the argument is something else.
bool optional(const irt_value& value, int dtype, const irt_view*& view) {
  view = value.kind == IRT_TENSOR ? value.tensors : nullptr;
  return value.kind == IRT_NONE || (view && (view->dtype == dtype || view->dtype == IRT_F32));
}

// The arguments, if they fit each other.
bool parse(const irt_call& call, Arguments& a) {
  if (call.nargs != 10 || call.nouts != 1) return false;
  a.out = &call.outs[0];
  const irt_view** views[] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i) {
    if (call.args[i].kind != IRT_TENSOR) return false;
    *views[i] = call.args[i].tensors;
    if (a.out->ndim != 4 || !has_sizes(**views[i], 4, a.out->sizes) || (*views[i])->dtype != a.out->dtype) return false;
  }
  for (int i = 3; i < 6; ++i) {
    if (call.args[i].kind != IRT_INT) return false;
  }
  a.size = call.args[3].i, a.heads = call.args[4].i, a.shift = call.args[5].i;
  const int64_t* sizes = a.out->sizes;
  if (a.size < 1 || a.heads < 1 || a.shift < 0 || a.shift >= a.size) return false;
  if (sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1) return false;
  if (sizes[1] % a.size || sizes[2] % a.size || sizes[3] % a.heads) return false;
  if (!is_number_or_none(call.args[6]) || !is_number_or_none(call.args[9])) return false;
  if (!optional(call.args[7], a.out->dtype, a.mask) || !optional(call.args[8], a.out->dtype, a.bias)) return false;
  a.scale = static_cast<float>(float_arg(call.args[6], 1.0 / std::sqrt(static_cast<double>(sizes[3] / a.heads))));
  a.mask_value = static_cast<float>(float_arg(call.args[9], -100.0));
  if (!std::isfinite(a.mask_value)) return false;
  const int64_t one[] = {1, sizes[1], sizes[2], 1}, each[] = {sizes[0], sizes[1], sizes[2], 1};
  if (a.mask && !has_sizes(*a.mask, 4, one) && !has_sizes(*a.mask, 4, each)) return false;
  const int64_t tokens = a.size * a.size, table[] = {a.heads, tokens, tokens};
  if (a.bias && !has_sizes(*a.bias, 3, table)) return false;
  a.threads = call.threads > 1 ? call.threads : 1;
  return true;
}

// (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) -> out
void window_attention(const irt_call& call, irt_status& status) {
  Arguments a;
  if (!parse(call, a)) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) and one output, maps "
                "(B, H, W, C) of one dtype that windows and heads divide");
  }
  switch (a.out->dtype) {
    case IRT_F32: return run<float>(a, status);
    case IRT_BF16: return run<bf16>(a, status);
    case IRT_F16: return run<f16>(a, status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(window_attention)

}  // namespace irt::INPAINTRT_ISA
