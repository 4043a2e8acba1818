// group_norm_silu on the CPU: out = act((x − mean)/√(variance + eps) · factor + addend), by groups of channels, where
// factor = weight · (1 + scale) and addend = bias · (1 + scale) + shift are a channel's. x may lie in two tensors.
//
// Bound by memory where tensors are large, by the exponential where they are in the cache. Where a channel's pixels are
// neighbours, a thread takes a group through statistics and the rest, last channel first, since that is in the cache;
// of fewer groups than threads it takes parts. In NHWC a group's pixels are spread over all of memory: statistics are
// taken in pieces of neighbouring pixels, with channels as lanes, and then each thread goes backwards through its
// pieces. How tensors are cut does not depend on the number of threads, and so neither do results.
#include "arena.h"
#include "group_norm_call.h"
#include "loop.h"
#include "parallel.h"
#include "run_moments.h"
#include "stream.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kThread = 65536;                // elements a thread is worth waking for
constexpr int64_t kPiece = 16384;                 // elements of a sample that are measured together in NHWC, at least
constexpr int64_t kUnit = 65536;                  // elements of one channel that one thread takes
constexpr int64_t kMostPieces = 64;               // of a sample in NHWC
constexpr int64_t kTogether = int64_t{1} << 18;   // elements of small samples that are taken at a time in NHWC
constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of output that are written past the cache
constexpr int64_t kMostChannels = int64_t{1} << 40;  // whose sums can be counted in bytes
enum { kOut, kX };                                   // operands of loops

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t up(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <class T>
inline Vec lanes(const T* p, int64_t n, int64_t stride) {
  return n == W && stride == 1 ? load(p) : load_some(p, n, stride);
}
template <class T>
inline void put(T* p, Vec v, int64_t n, int64_t stride) {
  n == W&& stride == 1 ? store(p, v) : store_some(p, v, n, stride);
}

// Σd and Σd² of a group, or of a part of it, about a number of the group.
struct Sums {
  double sum = 0.0, squares = 0.0;

  bool finite() const { return std::isfinite(squares); }
  void add(Sums more) { sum += more.sum, squares += more.squares; }
  void add(double d) { sum += d, squares += d * d; }
  void add(const Moments& moments, int64_t count = W) {  // of the first `count` lanes
    double s[W], q[W];
    store(s, moments.sum);
    store(q, moments.squares);
    for (int64_t i = 0; i < count; ++i) add(Sums{s[i], q[i]});
  }
};

// A channel's result before the activation is (x − mean) · slope + offset. The mean of floats is no float in general:
// what rounding took from it is in the offset.
struct Line {
  float mean, slope, offset;
};

template <Act act>
inline Vec finish(Vec x, Vec mean, Vec slope, Vec offset) {
  return activate<act>(fma(x - mean, slope, offset), Vec(0.0f));
}

// A channel's number of a vector (C,) or (B, C), of x's dtype or float.
double number(const irt_view* view, int64_t b, int64_t c, double absent) {
  if (!view) return absent;
  const int64_t i = view->ndim == 1 ? c * view->strides[0] : b * view->strides[0] + c * view->strides[1];
  switch (view->dtype) {
    case IRT_F32: return static_cast<double>(static_cast<const float*>(view->data)[i]);
    case IRT_BF16: return static_cast<double>(to_float(static_cast<const bf16*>(view->data)[i]));
    default: return static_cast<double>(to_float(static_cast<const f16*>(view->data)[i]));
  }
}

struct Norm : GroupNormCall {
  int threads;
};

// One of the tensors that x is joined from: its channels begin at `first` of the whole.
struct Part {
  const irt_view* view;
  int64_t first, channels;
};

template <class T>
struct Form {
  const Norm norm;
  const int64_t batch, channels, pixels, side;  // side: channels of a group
  Part parts[2];
  int count = 0;  // of parts
  const bool streamed;

  explicit Form(const Norm& n)
      : norm(n),
        batch(n.out->sizes[0]),
        channels(n.out->sizes[1]),
        pixels(n.out->sizes[2] * n.out->sizes[3]),
        side(channels / n.groups),
        streamed(batch * channels * pixels * static_cast<int64_t>(sizeof(T)) >= kStreamed) {
    parts[count++] = {n.x, 0, n.x->sizes[1]};
    if (n.second) parts[count++] = {n.second, n.x->sizes[1], n.second->sizes[1]};
  }

  const T* at(const Part& part, int64_t b, int64_t c) const {  // c: of the whole
    return static_cast<const T*>(part.view->data) + b * part.view->strides[0] +
           (c - part.first) * part.view->strides[1];
  }
  T* out_at(int64_t b, int64_t c) const {
    return static_cast<T*>(norm.out->data) + b * norm.out->strides[0] + c * norm.out->strides[1];
  }
  double pivot(int64_t b, int64_t group) const {
    const int64_t c = group * side;
    return static_cast<double>(to_float(*at(parts[c < parts[0].channels ? 0 : 1], b, c)));
  }

  // The lines of a group's channels, from its sums.
  template <class Put>
  void lines(int64_t b, int64_t group, double pivot, Sums sums, const Put& put_line) const {
    const double n = static_cast<double>(side * pixels);
    const double away = sums.sum / n, left = sums.squares / n - away * away;
    const double mean = pivot + away, steep = 1.0 / std::sqrt((left < 0.0 ? 0.0 : left) + norm.eps);
    const float rounded = static_cast<float>(mean);
    for (int64_t c = group * side; c < (group + 1) * side; ++c) {
      const double film = 1.0 + number(norm.scale, b, c, 0.0), slope = steep * number(norm.weight, b, c, 1.0) * film;
      const double addend = number(norm.bias, b, c, 0.0) * film + number(norm.shift, b, c, 0.0);
      const double lost = (static_cast<double>(rounded) - mean) * slope;
      // An infinite weight makes `lost` infinite, whose sign means nothing.
      put_line(c,
               Line{rounded, static_cast<float>(slope), static_cast<float>(addend + (std::isinf(slope) ? 0.0 : lost))});
    }
  }

  // ---- lanes are pixels -------------------------------------------------------------------------------------------

  // A unit: neighbouring channels of a group in one part with few pixels, or a piece of one channel's pixels.
  struct Unit {
    const Part* part;
    int64_t b, first, channels, begin, end;
  };
  int64_t unit_channels() const { return pixels >= kUnit ? 1 : least(side, kUnit / pixels); }
  int64_t unit_pieces() const { return up(pixels, kUnit); }
  int64_t units() const { return (up(side, unit_channels()) + 1) * unit_pieces(); }  // of a group; some may be empty

  bool unit(int64_t b, int64_t group, int64_t index, Unit& found) const {
    int64_t block = index / unit_pieces();
    const int64_t piece = index % unit_pieces(), most_channels = unit_channels();
    for (int i = 0; i < count; ++i) {
      const int64_t first = most(parts[i].first, group * side);
      const int64_t last = least(parts[i].first + parts[i].channels, (group + 1) * side);
      const int64_t blocks = last > first ? up(last - first, most_channels) : 0;
      if (block < blocks) {
        const int64_t from = first + block * most_channels;
        found = {
            &parts[i], b, from, least(most_channels, last - from), piece * kUnit, least(pixels, (piece + 1) * kUnit)};
        return true;
      }
      block -= blocks;
    }
    return false;
  }

  Loop<2> loop_of(const Part& part, int64_t some) const {  // over `some` channels and all pixels
    const int64_t *x = part.view->strides, *o = norm.out->strides, *n = norm.out->sizes;
    const int64_t sizes[] = {some, n[2], n[3]}, outs[] = {o[1], o[2], o[3]}, ins[] = {x[1], x[2], x[3]};
    return Loop<2>(3, sizes, {outs, ins});
  }

  template <bool kRuns>
  Sums sums_of(const Unit& u, double pivot) const {
    const Loop<2> loop = loop_of(*u.part, u.channels);
    const T* from = at(*u.part, u.b, u.first);
    const Wide pivots{Vec(static_cast<float>(pivot))};
    const int64_t stride = loop.strides[kX][loop.ndim - 1];
    Moments moments;
    Sums rest;
    // With more than one channel the unit has all of their pixels; with one channel the loop is over its pixels alone.
    loop.rows(u.channels * u.begin, u.channels * u.end, [&](const int64_t* offset, int64_t n) {
      const T* p = from + offset[kX];
      int64_t i = 0;
      if (kRuns && stride == 1) {
        for (; i + W * kRunLength <= n; i += W * kRunLength) {
          add_run(moments, p + i, W, pivots);
        }
      }
      for (; i + W <= n; i += W) moments.add(lanes(p + i * stride, W, stride), pivots);
      for (; i < n; ++i) rest.add(static_cast<double>(to_float(p[i * stride])) - pivot);
    });
    rest.add(moments);
    return rest;
  }
  Sums sums_of(const Unit& u, double pivot) const {
    const Sums quick = sums_of<true>(u, pivot);
    return quick.finite() ? quick : sums_of<false>(u, pivot);
  }

  template <Act act>
  void apply(const Unit& u, const float* means, const float* slopes, const float* offsets) const {
    const Loop<2> loop = loop_of(*u.part, 1);
    const int last = loop.ndim - 1;
    const int64_t in = loop.strides[kX][last], to = loop.strides[kOut][last];
    for (int64_t c = u.first + u.channels - 1; c >= u.first; --c) {
      const Vec mean(means[c]), slope(slopes[c]), offset(offsets[c]);
      loop.rows(u.begin, u.end, [&](const int64_t* first, int64_t n) {
        const T* p = at(*u.part, u.b, c) + first[kX];
        T* o = out_at(u.b, c) + first[kOut];
        int64_t i = 0;
        if (in == 1 && to == 1) {
          if (streamed && reinterpret_cast<uintptr_t>(o) % (W * sizeof(T)) == 0) {
            for (; i + W <= n; i += W) stream(o + i, finish<act>(load(p + i), mean, slope, offset));
          }
          for (; i + W <= n; i += W) store(o + i, finish<act>(load(p + i), mean, slope, offset));
        }
        for (; i < n; i += W) {
          const int64_t some = least(W, n - i);
          put(o + i * to, finish<act>(lanes(p + i * in, some, in), mean, slope, offset), some, to);
        }
      });
    }
    if (streamed) end_stream();
  }

  // space: lines of all channels of all samples, as three arrays; then the sums of all units.
  float* line_arrays(void* space, int64_t b) const { return static_cast<float*>(space) + b * channels; }
  int64_t line_step() const { return batch * channels; }
  Sums* unit_sums(void* space) const {
    return reinterpret_cast<Sums*>(static_cast<float*>(space) + up(3 * line_step(), 4) * 4);
  }
  size_t plane_bytes() const {
    return static_cast<size_t>(up(3 * line_step(), 4) * 16) +
           static_cast<size_t>(batch * norm.groups * units()) * sizeof(Sums);
  }

  void draw(int64_t b, int64_t group, const Sums* of_units, float* means) const {
    Sums total;
    for (int64_t i = 0; i < units(); ++i) total.add(of_units[i]);
    lines(b, group, pivot(b, group), total, [&](int64_t c, Line line) {
      means[c] = line.mean;
      means[line_step() + c] = line.slope;
      means[2 * line_step() + c] = line.offset;
    });
  }
  void measure(int64_t index, Sums* all) const {
    const int64_t group = index / units();
    Unit u;
    all[index] = unit(group / norm.groups, group % norm.groups, index % units(), u)
                     ? sums_of(u, pivot(u.b, group % norm.groups))
                     : Sums{};
  }
  void finish_unit(int64_t index, const float* means) const {
    const int64_t group = index / units();
    Unit u;
    if (!unit(group / norm.groups, group % norm.groups, index % units(), u)) return;
    means += u.b * channels;
    const auto* slopes = means + line_step();
    const auto* offsets = slopes + line_step();
    norm.act == Act::silu ? apply<Act::silu>(u, means, slopes, offsets) : apply<Act::none>(u, means, slopes, offsets);
  }

  void by_planes(void* space) const {
    Sums* all = unit_sums(space);
    float* means = static_cast<float*>(space);
    const int64_t n = units(), of_group = side * pixels, total = batch * norm.groups;
    const auto draw_group = [&](int64_t i) {
      draw(i / norm.groups, i % norm.groups, all + i * n, line_arrays(space, i / norm.groups));
    };
    if (total >= norm.threads) {
      return parallel_for(total, most(1, kThread / of_group), norm.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t k = 0; k < n; ++k) measure(i * n + k, all);
          draw_group(i);
          for (int64_t k = n - 1; k >= 0; --k) finish_unit(i * n + k, means);
        }
      });
    }
    const int64_t grain = most(1, kThread / most(1, of_group / n));
    parallel_for(total * n, grain, norm.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure(i, all);
    });
    for (int64_t i = 0; i < total; ++i) draw_group(i);
    parallel_for(total * n, grain, norm.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) finish_unit(i, means);
    });
  }

  // ---- lanes are channels -----------------------------------------------------------------------------------------
  // Each part's channels are whole vectors of slots, so that no vector holds channels of both.

  int64_t slot(const Part& part) const { return part.first ? up(part.first, W) * W : 0; }
  int64_t slots() const { return slot(parts[count - 1]) + up(parts[count - 1].channels, W) * W; }
  int64_t slot_of(int64_t c) const {
    const Part& part = parts[count > 1 && c >= parts[1].first ? 1 : 0];
    return slot(part) + c - part.first;
  }
  int64_t piece() const { return most(up(pixels, kMostPieces), most(1, kPiece / channels)); }
  int64_t pieces() const { return up(pixels, piece()); }
  int64_t samples() const { return least(batch, most(1, kTogether / most(1, channels * pixels))); }  // at a time

  // Of each piece of the samples in hand: sums of its groups; while they are taken, of its slots. Of each sample:
  // pivots, then means, slopes and offsets of its slots.
  int64_t piece_doubles() const { return 2 * slots() + 2 * norm.groups; }
  int64_t sample_floats() const { return 4 * slots(); }
  size_t pixel_bytes() const {
    return static_cast<size_t>(samples() * (pieces() * piece_doubles() * 8 + sample_floats() * 4));
  }

  Loop<2> loop_of_pixels(const Part& part) const {
    return Loop<2>(2, norm.out->sizes + 2, {norm.out->strides + 2, part.view->strides + 2});
  }

  template <bool kRuns>
  void sum_slots(int64_t b, int64_t begin, int64_t end, const float* pivots, double* sums, double* squares) const {
    for (int64_t i = 0; i < slots(); ++i) sums[i] = squares[i] = 0.0;
    for (int k = 0; k < count; ++k) {
      const Part& part = parts[k];
      const Loop<2> loop = loop_of_pixels(part);
      const T* from = at(part, b, part.first);
      const int64_t step = loop.strides[kX][loop.ndim - 1], channel = part.view->strides[1], base = slot(part);
      loop.rows(begin, end, [&](const int64_t* offset, int64_t n) {
        for (int64_t i = 0; i < n; i += kRunLength) {
          const int64_t run = least(kRunLength, n - i);
          for (int64_t c = 0; c < part.channels; c += W) {
            const int64_t some = least(W, part.channels - c);
            const T* p = from + offset[kX] + i * step + c * channel;
            const Wide pivot(load(pivots + base + c));
            Moments moments{load(sums + base + c), load(squares + base + c)};
            if (kRuns && run == kRunLength && some == W && channel == 1) {
              add_run(moments, p, step, pivot);
            } else {
              for (int64_t j = 0; j < run; ++j) moments.add(lanes(p + j * step, some, channel), pivot);
            }
            store(sums + base + c, moments.sum);
            store(squares + base + c, moments.squares);
          }
        }
      });
    }
  }

  void measure_piece(int64_t b, int64_t index, const float* pivots, double* space) const {
    const int64_t begin = index * piece(), end = least(pixels, begin + piece());
    double *sums = space + 2 * norm.groups, *squares = sums + slots();
    Sums* groups = reinterpret_cast<Sums*>(space);
    const auto join = [&] {
      bool finite = true;
      for (int64_t g = 0; g < norm.groups; ++g) {
        groups[g] = Sums{};
        for (int64_t c = g * side; c < (g + 1) * side; ++c) groups[g].add(Sums{sums[slot_of(c)], squares[slot_of(c)]});
        finite = finite && groups[g].finite();
      }
      return finite;
    };
    sum_slots<true>(b, begin, end, pivots, sums, squares);
    if (join()) return;
    sum_slots<false>(b, begin, end, pivots, sums, squares);
    join();
  }

  template <Act act>
  void finish_pixels(int64_t b, int64_t begin, int64_t end, const float* means) const {
    const float *slopes = means + slots(), *offsets = slopes + slots();
    for (int k = 0; k < count; ++k) {
      const Part& part = parts[k];
      const Loop<2> loop = loop_of_pixels(part);
      const int last = loop.ndim - 1;
      const T* from = at(part, b, part.first);
      T* to = out_at(b, part.first);
      const int64_t in = part.view->strides[1], out = norm.out->strides[1], base = slot(part);
      const bool dense = in == 1 && out == 1;
      loop.rows(begin, end, [&](const int64_t* offset, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const T* p = from + offset[kX] + i * loop.strides[kX][last];
          T* o = to + offset[kOut] + i * loop.strides[kOut][last];
          const auto result = [&](int64_t c, Vec x) {
            return finish<act>(x, load(means + base + c), load(slopes + base + c), load(offsets + base + c));
          };
          int64_t c = 0;
          if (dense) {
            if (streamed && reinterpret_cast<uintptr_t>(o) % (W * sizeof(T)) == 0) {
              for (; c + W <= part.channels; c += W) stream(o + c, result(c, load(p + c)));
            }
            for (; c + W <= part.channels; c += W) store(o + c, result(c, load(p + c)));
          }
          for (; c < part.channels; c += W) {
            const int64_t some = least(W, part.channels - c);
            put(o + c * out, result(c, lanes(p + c * in, some, in)), some, out);
          }
        }
      });
    }
    if (streamed) end_stream();
  }

  void by_pixels(void* space) const {
    const int64_t all = pieces();
    double* sums = static_cast<double*>(space);
    float* floats = reinterpret_cast<float*>(sums + samples() * all * piece_doubles());
    const auto grain = most(1, kThread / most(1, piece() * channels));
    for (int64_t b = 0; b < batch; b += samples()) {
      const int64_t some = least(samples(), batch - b);
      for (int64_t s = 0; s < some; ++s) {
        float* pivots = floats + s * sample_floats();
        for (int64_t c = 0; c < channels; ++c) pivots[slot_of(c)] = static_cast<float>(pivot(b + s, c / side));
      }
      parallel_for(some * all, grain, norm.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          measure_piece(b + i / all, i % all, floats + i / all * sample_floats(), sums + i * piece_doubles());
        }
      });
      for (int64_t s = 0; s < some; ++s) {
        float* means = floats + s * sample_floats() + slots();
        for (int64_t g = 0; g < norm.groups; ++g) {
          Sums total;
          for (int64_t i = 0; i < all; ++i) {
            total.add(reinterpret_cast<const Sums*>(sums + (s * all + i) * piece_doubles())[g]);
          }
          lines(b + s, g, pivot(b + s, g), total, [&](int64_t c, Line line) {
            means[slot_of(c)] = line.mean;
            means[slots() + slot_of(c)] = line.slope;
            means[2 * slots() + slot_of(c)] = line.offset;
          });
        }
      }
      parallel_for(some * all, grain, norm.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; --i) {
          const int64_t first = i % all * piece();
          const int64_t last = least(pixels, first + piece());
          const float* means = floats + i / all * sample_floats() + slots();
          norm.act == Act::silu ? finish_pixels<Act::silu>(b + i / all, first, last, means)
                                : finish_pixels<Act::none>(b + i / all, first, last, means);
        }
      });
    }
  }

  void run(irt_status& status) const {
    if (batch * channels * pixels == 0) return;  // pointers may be null
    const int64_t* strides = norm.out->strides;
    const int64_t step = norm.out->sizes[3] > 1 ? strides[3] : norm.out->sizes[2] > 1 ? strides[2] : 1;
    const bool channels_last = channels > 1 && strides[1] == 1 && step != 1;
    const Workspace space(line_step() > kMostChannels ? SIZE_MAX : channels_last ? pixel_bytes() : plane_bytes());
    if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the statistics");
    channels_last ? by_pixels(space.data()) : by_planes(space.data());
  }
};

void group_norm_silu(const irt_call& call, irt_status& status) {
  Norm norm;
  if (!norm.read(call, status)) return;
  norm.threads = call.threads;
  switch (norm.out->dtype) {
    case IRT_F32: return Form<float>(norm).run(status);
    case IRT_BF16: return Form<bf16>(norm).run(status);
    case IRT_F16: return Form<f16>(norm).run(status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(group_norm_silu)

}  // namespace irt::INPAINTRT_ISA
