// window_attention on the CPU: softmax attention inside (shifted) windows, by addresses instead of rolled, cut copies.
//
// A window's rows are read once, as floats, then its heads follow one another with everything in the cache. Lanes are
// queries: a panel of kPanelColumns queries is transposed once, and then scores, their maximum, exponentials and sums
// need no operation across lanes, a mask is one number per key, and any number of keys costs no padding.
//
//   S[key][query]       = Σ_c K[key][c] · Q[c][query] + addends      in tiles of rows that are keys
//   out[channel][query] = Σ_key V[key][channel] · exp(S − max)       in tiles of rows that are channels
//
// What the addends are decides the way a window is computed:
//   plain   one region, and the mask the same everywhere (all valid, or none): a constant cancels, no addends at all.
//   sparse  per region of queries only the keys whose addend is the best of that region, or close to it. A key that is
//           left out has at least `gap` less; by Cauchy and Schwarz logits differ by no more than
//           2·|scale|·max|q|·max|k|, so the weights of all of them together are below N·e^(2·|scale|·max|q|·max|k| −
//           gap) of the largest. They are left out where that, times the norm of all values over that of the values
//           used, is below 2⁻²⁴: float32 would not show them. The norms are those of the window's own data, and one
//           that is not finite forbids it.
//   exact   everything else, and all calls with a bias: all keys, all addends, added in the order of the definition.
//
// Weights add up to 1, so where all values are one vector, that is the result. Windows without a valid token are asked
// for it: MAT's have it, since what comes into its transformer is 0 where nothing is valid.
#include <cfloat>
#include <cstring>

#include "arena.h"
#include "gemm.h"
#include "kernel.h"
#include "parallel.h"
#include "window_keys.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t P = kPanelColumns;
constexpr int64_t kKeys = 64;             // whose values are added up in one chain
constexpr int64_t kStaged = 64 * 1024;    // floats of rows that stay in the cache while their heads are computed
constexpr int64_t kMostTokens = 1 << 24;  // of a window, and channels: so that its bytes can be counted
constexpr double kNegligible = 16.7;      // ln 2²⁴

// As high as tiles of gemm.h, and all of one height if possible.
int64_t even_height(int64_t rows) { return ceil_div(rows, ceil_div(rows, kTileRows)); }

struct Sizes {
  int64_t windows, tokens, heads, channels;  // channels: of a head
  int64_t groups, row;                       // vectors of a head's channels, and floats in them
  int64_t padded;                            // tokens, as whole panels
  int64_t together;                          // heads whose rows are read at once
  int64_t block, head;                       // floats from one group of a head\'s keys to the next; from head to head
  int64_t staged, output, table, scratch;    // floats: one tensor's rows; of results; transposed bias; of a thread

  explicit Sizes(const WindowCall& call) {
    windows = call.out->sizes[0] * call.down() * call.across();
    tokens = call.tokens(), heads = call.heads, channels = call.out->sizes[3] / heads;
    groups = ceil_div(channels, W), row = groups * W, padded = ceil_div(tokens, P) * P;
    block = (tokens + 1) * W, head = groups * block + W;  // no powers of two, which would share sets of the cache
    together = heads;
    // Few windows are shared out by heads; and what is read at once must stay in the cache.
    while (together > 1 && (3 * together * head > kStaged || windows * (heads / together) < 4 * call.threads)) {
      do --together;
      while (heads % together);
    }
    staged = vectors(together * head), output = vectors(together * tokens * channels);
    table = call.bias ? vectors(heads * tokens * padded) : 0;
    scratch = 3 * staged + output + vectors(head) + vectors(tokens * row) + 2 * vectors(row * P) + vectors(tokens * P);
    scratch += Window::floats(call);
  }
  int64_t units() const { return windows * (heads / together); }
};

// One thread's window, and the heads of it that are in its memory.
class Attention {
 public:
  Attention(const WindowCall& call, const Sizes& sizes, const float* table, float* space)
      : call_(call), s_(sizes), table_(table), window_(call, space) {
    space += Window::floats(call);
    const auto take = [&](int64_t floats) {
      float* at = space;
      space += vectors(floats);
      return at;
    };
    for (float*& rows : staged_) rows = take(s_.staged);
    output_ = take(s_.output);
    some_keys_ = take(s_.head), some_values_ = take(s_.tokens * s_.row);
    panel_ = take(s_.row * P), sums_ = take(s_.row * P), scores_ = take(s_.tokens * P);
  }

  template <class T>
  void run(int64_t unit) {
    const int64_t parts = s_.heads / s_.together, window = unit / parts, first = unit % parts * s_.together;
    if (window != entered_) window_.enter(entered_ = window);
    stage<T>(Window::kQ, *call_.q, first);
    stage<T>(Window::kK, *call_.k, first);
    stage<T>(Window::kV, *call_.v, first);
    for (int64_t h = 0; h < s_.together; ++h) attend(h, first + h);
    give<T>(first);
  }

 private:
  const WindowCall& call_;
  const Sizes& s_;
  const float* table_;
  Window window_;
  int64_t entered_ = -1;
  float* staged_[3];                 // queries and values [head][token][channel], keys [head][group][token][lane]
  float* output_;                    // [token][channel of all heads in memory]
  float *some_keys_, *some_values_;  // the keys of a region, and their values
  float *panel_, *sums_, *scores_;   // queries [channel][query]; results likewise; [key][query]
  const float *queries_, *keys_, *values_;  // of the head

  int64_t width(int64_t group) const { return least(W, s_.channels - group * W); }

  // ---- rows of tensors in and out

  // Windows are too short for the CPU's own prefetching: the row below the one that is being read.
  template <class T>
  void prefetch(const T* row) const {
    const auto* bytes = reinterpret_cast<const char*>(row);
    const int64_t count = s_.together * s_.channels * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(bytes + i);
  }

  template <class T>
  void stage(int tensor, const irt_view& view, int64_t first_head) {
    const int64_t step = view.strides[3];
    const T* data = static_cast<const T*>(view.data) + first_head * s_.channels * step;
    const bool blocked = tensor == Window::kK;
    const int64_t token_step = blocked ? W : s_.row, group_step = blocked ? s_.block : W;
    for (int64_t t = 0; t < s_.tokens; ++t) {
      const T* from = data + window_.offsets[tensor][t];
      if (step == 1) prefetch(data + window_.offsets[tensor][least(t + call_.size, s_.tokens - 1)]);
      for (int64_t h = 0; h < s_.together; ++h) {
        float* to = staged_[tensor] + h * s_.head + t * token_step;
        for (int64_t group = 0; group < s_.groups; ++group) {
          store(to + group * group_step, Single::across(from + group * W * step, width(group), step));
        }
        from += s_.channels * step;
      }
    }
  }

  template <class T>
  void give(int64_t first_head) const {
    const int64_t step = call_.out->strides[3], count = s_.together * s_.channels;
    T* data = static_cast<T*>(call_.out->data) + first_head * s_.channels * step;
    for (int64_t t = 0; t < s_.tokens; ++t) {
      const float* from = output_ + t * count;
      T* to = data + window_.offsets[Window::kOut][t];
      int64_t c = 0;
      for (; step == 1 && c + W <= count; c += W) store(to + c, load(from + c));
      for (; c < count; c += W) {
        const int64_t some = least(W, count - c);
        store_some(to + c * step, load_some(from + c, some), some, step);
      }
    }
  }

  // ---- one head

  void attend(int64_t h, int64_t head) {
    queries_ = staged_[Window::kQ] + h * s_.head;
    keys_ = staged_[Window::kK] + h * s_.head, values_ = staged_[Window::kV] + h * s_.head;
    float* output = output_ + h * s_.channels;
    if (window_.vacant && holds_one_value()) {
      const size_t bytes = static_cast<size_t>(s_.channels) * sizeof(float);
      for (int64_t t = 0; t < s_.tokens; ++t) memcpy(output + t * s_.together * s_.channels, values_, bytes);
      return;
    }
    if (window_.way == Window::kSparse && negligible()) {
      for (int i = 0; i < window_.regions; ++i) sparse(window_.region[i], output);
      return;
    }
    for (int64_t first = 0; first < s_.tokens; first += P) {
      const int64_t n = least(P, s_.tokens - first);
      const auto token = [&](int64_t i) { return first + i; };
      take_queries(n, token);
      Vec top[kPanelVectors];
      score(keys_, s_.tokens, top);
      if (window_.way != Window::kPlain) add_everything(head, first, n, top);
      weigh(values_, s_.tokens, top);
      finish(n, token, output);
    }
  }

  void sparse(const Region& r, float* output) {
    const float *keys = keys_, *values = values_;
    if (r.keys < s_.tokens) {
      for (int64_t i = 0; i < r.keys; ++i) {
        for (int64_t group = 0; group < s_.groups; ++group) {
          store(some_keys_ + group * s_.block + i * W, load(keys_ + group * s_.block + r.list[i] * W));
          store(some_values_ + i * s_.row + group * W, load(values_ + r.list[i] * s_.row + group * W));
        }
      }
      keys = some_keys_, values = some_values_;
    }
    for (int64_t first = 0; first < r.tokens(); first += P) {
      const int64_t n = least(P, r.tokens() - first);
      const auto token = [&](int64_t i) {
        return (r.top + (first + i) / r.width) * call_.size + r.left + (first + i) % r.width;
      };
      take_queries(n, token);
      Vec top[kPanelVectors];
      score(keys, r.keys, top);
      if (!r.level) add(r.keys, top, [&](int64_t key, int, Vec s) { return s + Vec(r.addends[key]); });
      weigh(values, r.keys, top);
      finish(n, token, output);
    }
  }

  // All addends, for the queries from `first` on.
  void add_everything(int64_t head, int64_t first, int64_t n, Vec (&top)[kPanelVectors]) {
    const float* bias = table_ ? table_ + head * s_.tokens * s_.padded + first : nullptr;
    float seams[Window::kMostRegions][P] = {};  // what a key of a region adds to a query
    for (int i = 0; i < window_.regions; ++i) {
      for (int64_t t = 0; t < n; ++t) seams[i][t] = window_.region_of[first + t] == i ? 0.0f : call_.mask_value;
    }
    add(s_.tokens, top, [&](int64_t key, int v, Vec s) {
      if (bias) s = s + load(bias + key * s_.padded + v * W);
      if (window_.regions > 1) s = s + load(seams[window_.region_of[key]] + v * W);
      if (window_.masked) s = s + Vec(window_.added[key]);
      return s;
    });
  }

  // ---- whether keys may be left out

  static float sum_of_lanes(Vec x) {
    float lanes[W], sum = 0.0f;
    store(lanes, x);
    for (const float lane : lanes) sum += lane;
    return sum;
  }

  // The largest squared norm of the window's tokens; not finite if one of them is not.
  double largest(const float* rows, int64_t token_step, int64_t group_step) const {
    Vec best(0.0f), total(0.0f);
    for (int64_t first = 0; first < s_.tokens; first += W) {
      Vec squares[W];
      for (int64_t i = 0; i < least(W, s_.tokens - first); ++i) {
        for (int64_t group = 0; group < s_.groups; ++group) {
          const Vec x = load(rows + (first + i) * token_step + group * group_step);
          squares[i] = fma(x, x, squares[i]);
        }
      }
      transpose(squares);
      Vec sum = squares[0];
      for (int64_t i = 1; i < W; ++i) sum = sum + squares[i];
      best = at_least(best, sum);
      total = total + sum;  // keeps a NaN that a later maximum loses
    }
    const float sum = sum_of_lanes(total);
    if (!std::isfinite(sum)) return static_cast<double>(sum);
    float lanes[W], result = 0.0f;
    store(lanes, best);
    for (const float lane : lanes) result = lane > result ? lane : result;
    return static_cast<double>(result);
  }

  // Σ|v|² of the tokens in a list.
  double values_squared(const int32_t* list, int64_t n) const {
    Vec squares(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t group = 0; group < s_.groups; ++group) {
        const Vec x = load(values_ + list[i] * s_.row + group * W);
        squares = fma(x, x, squares);
      }
    }
    return static_cast<double>(sum_of_lanes(squares));
  }

  // What no |q·k| of the window is above.
  double longest() const { return std::sqrt(largest(queries_, s_.row, W) * largest(keys_, W, s_.block)); }

  // Whether all values are one vector, bit for bit, and all logits finite: else the result is none.
  bool holds_one_value() const {
    const size_t bytes = static_cast<size_t>(s_.row) * sizeof(float);
    for (int64_t t = 1; t < s_.tokens; ++t) {
      if (memcmp(values_, values_ + t * s_.row, bytes) != 0) return false;
    }
    const double most = 0.25 * static_cast<double>(FLT_MAX);
    return std::isfinite(values_squared(window_.all, 1)) && longest() * std::fmax(1.0, std::fabs(call_.scale)) < most &&
           std::fabs(call_.mask_value) < most;
  }

  bool negligible() const {
    double gap = INFINITY;
    for (int i = 0; i < window_.regions; ++i) gap = window_.region[i].gap < gap ? window_.region[i].gap : gap;
    if (gap == INFINITY) return true;  // nothing is left out
    const double spread = 2.0 * std::fabs(static_cast<double>(call_.scale)) * longest();
    const double room = gap - spread - kNegligible - std::log(static_cast<double>(s_.tokens));
    if (!(room > 0.0)) return false;
    const double all = values_squared(window_.all, s_.tokens);
    const double factor = std::exp(2.0 * (room < 300.0 ? room : 300.0));
    for (int i = 0; i < window_.regions; ++i) {
      const Region& r = window_.region[i];
      if (!(all < INFINITY) || !(all <= factor * values_squared(r.list, r.keys))) return false;
    }
    return true;
  }

  // ---- steps

  // Queries token(0) … token(n − 1), times the scale, as panel_; what fills it is 0.
  template <class Token>
  void take_queries(int64_t n, const Token& token) {
    const Vec scale(call_.scale);
    for (int64_t first = 0; first < P; first += W) {
      const float* from[W] = {};
      const int64_t some = n - first < W ? n - first : W;
      for (int64_t i = 0; i < some; ++i) from[i] = queries_ + token(first + i) * s_.row;
      for (int64_t group = 0; group < s_.groups; ++group) {
        Vec rows[W];
        for (int64_t i = 0; i < some; ++i) rows[i] = load(from[i] + group * W) * scale;
        transpose(rows);
        for (int64_t c = 0; c < W; ++c) store(panel_ + (group * W + c) * P + first, rows[c]);
      }
    }
  }

  // scores_ of n keys with the panel, and the largest of each query.
  void score(const float* keys, int64_t n, Vec (&top)[kPanelVectors]) {
    for (Vec& t : top) t = Vec(-INFINITY);
    const int64_t height = even_height(n);
    for (int64_t row = 0; row < n; row += height) {
      with_height(static_cast<int>(least(height, n - row)),
                  [&](auto rows) { score_tile<decltype(rows)::value>(keys + row * W, scores_ + row * P, top); });
    }
  }
  template <int kRows>
  void score_tile(const float* keys, float* to, Vec (&top)[kPanelVectors]) const {
    Vec sums[kRows][kPanelVectors];
    for (int64_t group = 0; group < s_.groups; ++group, keys += s_.block) {
      accumulate<Single, kRows>(keys, panel_ + group * W * P, static_cast<int>(width(group)), sums);
    }
    each<kRows>([&](int r, int v) {
      store(to + r * P + v * W, sums[r][v]);
      top[v] = at_least(top[v], sums[r][v]);
    });
  }

  // scores_ = addend(key, vector, scores_), and their maxima.
  template <class Addend>
  void add(int64_t n, Vec (&top)[kPanelVectors], const Addend& addend) {
    for (int v = 0; v < kPanelVectors; ++v) {
      Vec best(-INFINITY);
      for (int64_t key = 0; key < n; ++key) {
        const Vec s = addend(key, v, load(scores_ + key * P + v * W));
        store(scores_ + key * P + v * W, s);
        best = at_least(best, s);
      }
      top[v] = best;
    }
  }

  // sums_: of the values of n keys, weighed by the softmax of scores_.
  void weigh(const float* values, int64_t n, const Vec (&top)[kPanelVectors]) {
    Vec sums[kPanelVectors];
    const int64_t height = even_height(s_.channels);
    for (int64_t first = 0; first < n; first += kKeys) {
      const int64_t count = least(kKeys, n - first);
      float* weights = scores_ + first * P;
      for (int v = 0; v < kPanelVectors; ++v) {
        Vec chunk(0.0f);
        for (int64_t i = 0; i < count; ++i) {
          const Vec e = exp(load(weights + i * P + v * W) - top[v]);
          store(weights + i * P + v * W, e);
          chunk = chunk + e;
        }
        sums[v] = sums[v] + chunk;
      }
      for (int64_t c = 0; c < s_.channels; c += height) {
        with_height(static_cast<int>(least(height, s_.channels - c)), [&](auto rows) {
          weigh_tile<decltype(rows)::value>(values + first * s_.row + c, weights, count, sums_ + c * P, first == 0);
        });
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) {
      const Vec inverse = Vec(1.0f) / sums[v];
      for (int64_t c = 0; c < s_.channels; ++c) {
        float* at = sums_ + c * P + v * W;
        store(at, load(at) * inverse);
      }
    }
  }
  template <int kRows>
  void weigh_tile(const float* values, const float* weights, int64_t keys, float* to, bool first) const {
    Vec sums[kRows][kPanelVectors];
#pragma GCC unroll 1
    for (int64_t i = 0; i < keys; ++i, values += s_.row, weights += P) {
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
      float* at = to + r * P + v * W;
      store(at, first ? sums[r][v] : load(at) + sums[r][v]);
    });
  }

  // sums_ of the first n queries to the rows of their tokens.
  template <class Token>
  void finish(int64_t n, const Token& token, float* output) const {
    const int64_t step = s_.together * s_.channels;
    for (int64_t first = 0; first < n; first += W) {
      for (int64_t group = 0; group < s_.groups; ++group) {
        Vec rows[W];
        for (int64_t c = 0; c < width(group); ++c) rows[c] = load(sums_ + (group * W + c) * P + first);
        transpose(rows);
        for (int64_t i = 0; i < least(W, n - first); ++i) {
          float* to = output + token(first + i) * step + group * W;
          width(group) == W ? store(to, rows[i]) : store_some(to, rows[i], width(group));
        }
      }
    }
  }
};

// [head][key][query], queries padded to whole panels with 0.
void transpose_bias(const WindowCall& call, const Sizes& s, float* table) {
  const irt_view& bias = *call.bias;
  parallel_for(s.heads * s.tokens, 16, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = row / s.tokens * bias.strides[0] + row % s.tokens * bias.strides[2];
      float* to = table + row * s.padded;
      for (int64_t i = 0; i < s.padded; ++i) to[i] = i < s.tokens ? element(bias, from + i * bias.strides[1]) : 0.0f;
    }
  });
}

template <class T>
void run(const WindowCall& call, irt_status& status) {
  if (call.out->sizes[0] == 0) return;  // pointers may be null
  if (call.tokens() > kMostTokens || call.out->sizes[3] > kMostTokens) {
    return fail(status, IRT_OUT_OF_MEMORY, "no memory for a window of that size");
  }
  const Sizes s(call);
  const int64_t workers = least(call.threads, s.units());
  const Workspace space(static_cast<size_t>(s.table + workers * s.scratch) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for a window's rows and scores");
  auto* table = static_cast<float*>(space.data());
  if (call.bias) transpose_bias(call, s, table);
  // Masks make windows differ in work, so a thread takes the next unit when it has finished one.
  int64_t next = 0;
  parallel_for(workers, 1, call.threads, [&](int64_t begin, int64_t) {
    Attention attention(call, s, call.bias ? table : nullptr, table + s.table + begin * s.scratch);
    for (int64_t unit; (unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < s.units();) attention.run<T>(unit);
  });
}

// ---- the call
// ---------------------------------------------------------------------------------------------------------

bool has_sizes(const irt_view& x, int ndim, const int64_t* sizes) {
  return x.ndim == ndim && !memcmp(x.sizes, sizes, static_cast<size_t>(ndim) * sizeof sizes[0]);
}

// An optional tensor of `dtype` or float32; false if the argument is something else.
bool optional(const irt_value& value, int dtype, const irt_view*& view) {
  view = value.kind == IRT_TENSOR ? value.tensors : nullptr;
  return value.kind == IRT_NONE || (view && (view->dtype == dtype || view->dtype == IRT_F32));
}

// Whether the arguments fit each other.
bool parse(const irt_call& call, WindowCall& w) {
  if (call.nargs != 10 || call.nouts != 1) return false;
  w.out = &call.outs[0];
  const irt_view** views[] = {&w.q, &w.k, &w.v};
  for (int i = 0; i < 3; ++i) {
    if (call.args[i].kind != IRT_TENSOR || w.out->ndim != 4) return false;
    *views[i] = call.args[i].tensors;
    if (!has_sizes(**views[i], 4, w.out->sizes) || (*views[i])->dtype != w.out->dtype) return false;
  }
  for (int i = 3; i < 6; ++i) {
    if (call.args[i].kind != IRT_INT) return false;
  }
  w.size = call.args[3].i, w.heads = call.args[4].i, w.shift = call.args[5].i;
  const int64_t* sizes = w.out->sizes;
  if (w.size < 1 || w.heads < 1 || w.shift < 0 || w.shift >= w.size) return false;
  if (sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1) return false;
  if (sizes[1] % w.size || sizes[2] % w.size || sizes[3] % w.heads) return false;
  if (!is_number_or_none(call.args[6]) || !is_number_or_none(call.args[9])) return false;
  if (!optional(call.args[7], w.out->dtype, w.mask) || !optional(call.args[8], w.out->dtype, w.bias)) return false;
  w.scale = static_cast<float>(float_arg(call.args[6], 1.0 / std::sqrt(static_cast<double>(sizes[3] / w.heads))));
  w.mask_value = static_cast<float>(float_arg(call.args[9], -100.0));
  if (!std::isfinite(w.mask_value)) return false;
  const int64_t one[] = {1, sizes[1], sizes[2], 1}, each[] = {sizes[0], sizes[1], sizes[2], 1};
  if (w.mask && !has_sizes(*w.mask, 4, one) && !has_sizes(*w.mask, 4, each)) return false;
  const int64_t table[] = {w.heads, w.tokens(), w.tokens()};
  if (w.bias && !has_sizes(*w.bias, 3, table)) return false;
  w.threads = call.threads > 1 ? call.threads : 1;
  return true;
}

// (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) -> out
void window_attention(const irt_call& call, irt_status& status) {
  WindowCall w;
  if (!parse(call, w)) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (q, k, v, window_size, num_heads, shift, scale, mask, bias, mask_value) and one output, maps "
                "(B, H, W, C) of one dtype that windows and heads divide");
  }
  switch (w.out->dtype) {
    case IRT_F32: return run<float>(w, status);
    case IRT_BF16: return run<bf16>(w, status);
    case IRT_F16: return run<f16>(w, status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(window_attention)

}  // namespace irt::INPAINTRT_ISA
