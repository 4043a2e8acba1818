// aot_gate on the CPU: out = x + (fuse − x) · sigmoid(10 · (gate − mean)/(std + eps) − 5), by channel.
//
// Bound by memory: statistics read the gate, the blend reads three tensors and writes one. Where a channel's pixels are
// neighbours, a thread takes a channel through both, and its gate is still in the cache the second time. In NHWC a
// channel's pixels are spread over all of memory, so statistics of all channels are taken in pieces of neighbouring
// pixels, with channels as lanes. How pixels are cut does not depend on the number of threads, and so neither do
// results.
#include "arena.h"
#include "kernel.h"
#include "loop.h"
#include "moments.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kGrain = 16384;                    // elements a thread is worth waking for
constexpr int64_t kMostPieces = 64;                  // of a sample in NHWC
constexpr int64_t kRun = 16;                         // pixels whose sums stay in registers
constexpr int64_t kMostChannels = int64_t{1} << 40;  // whose sums can be counted in bytes
enum { kOut, kX, kFuse, kGate };                     // operands of the loop over the pixels of a channel

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The mask's argument is (gate − mean) · slope + offset. The mean of floats is no float in general; what rounding took
// from it is in the offset, since 10⁴ ± 0.01 has a deviation of ten units in the last place of its mean.
struct Line {
  float mean, slope, offset;

  Line(Spread spread, double eps) {
    const double steep = 10.0 / (spread.deviation + eps);
    mean = static_cast<float>(spread.mean);
    slope = static_cast<float>(steep);
    offset = static_cast<float>((static_cast<double>(mean) - spread.mean) * steep - 5.0);
  }
};

inline Vec blend(Vec x, Vec fuse, Vec gate, Vec mean, Vec slope, Vec offset) {
  return fma(fuse - x, sigmoid(fma(gate - mean, slope, offset)), x);
}

template <class T>
inline Vec lanes(const T* p, int64_t n, int64_t stride) {
  return n == W && stride == 1 ? load(p) : load_some(p, n, stride);
}
template <class T>
inline void put(T* p, Vec v, int64_t n, int64_t stride) {
  n == W&& stride == 1 ? store(p, v) : store_some(p, v, n, stride);
}

template <class T>
struct Gate {
  const T *x, *fuse, *gate;
  T* out;
  const irt_view* views[4];  // as the operands of the loop
  Loop<4> pixels;
  int64_t batch, channels, count;  // count: pixels of a channel
  double eps;
  int threads;

  Gate(const irt_call& call, double epsilon)
      : views{&call.outs[0], call.args[0].tensors, call.args[1].tensors, call.args[2].tensors},
        pixels(
            2, views[kOut]->sizes + 2,
            {views[kOut]->strides + 2, views[kX]->strides + 2, views[kFuse]->strides + 2, views[kGate]->strides + 2}),
        batch(views[kOut]->sizes[0]),
        channels(views[kOut]->sizes[1]),
        count(views[kOut]->sizes[2] * views[kOut]->sizes[3]),
        eps(epsilon),
        threads(call.threads) {
    x = static_cast<const T*>(views[kX]->data);
    fuse = static_cast<const T*>(views[kFuse]->data);
    gate = static_cast<const T*>(views[kGate]->data);
    out = static_cast<T*>(views[kOut]->data);
  }

  int64_t at(int operand, int64_t b, int64_t c) const {
    return b * views[operand]->strides[0] + c * views[operand]->strides[1];
  }
  int64_t step(int operand) const { return pixels.strides[operand][pixels.ndim - 1]; }

  // ---- lanes are pixels -------------------------------------------------------------------------------------------

  Spread spread_of(const T* from) const {
    const double pivot = static_cast<double>(to_float(*from));
    const Wide pivots{Vec(static_cast<float>(pivot))};
    Moments moments;
    double sum = 0.0, squares = 0.0;
    const int64_t stride = step(kGate);
    pixels.rows(0, count, [&](const int64_t* offset, int64_t n) {
      const T* p = from + offset[kGate];
      int64_t i = 0;
      for (; i + W <= n; i += W) moments.add(lanes(p + i * stride, W, stride), pivots);
      for (; i < n; ++i) {
        const double d = static_cast<double>(to_float(p[i * stride])) - pivot;
        sum += d;
        squares += d * d;
      }
    });
    double sums[W], all_squares[W];
    store(sums, moments.sum);
    store(all_squares, moments.squares);
    for (int64_t i = 0; i < W; ++i) sum += sums[i], squares += all_squares[i];
    return {pivot, sum, squares, count};
  }

  void plane(int64_t b, int64_t c) const {
    const T* g = gate + at(kGate, b, c);
    const Line line(spread_of(g), eps);
    const Vec mean(line.mean), slope(line.slope), offset(line.offset);
    const int64_t steps[] = {step(kOut), step(kX), step(kFuse), step(kGate)};
    pixels.rows(0, count, [&](const int64_t* first, int64_t n) {
      const T *xs = x + at(kX, b, c) + first[kX], *fuses = fuse + at(kFuse, b, c) + first[kFuse],
              *gates = g + first[kGate];
      T* outs = out + at(kOut, b, c) + first[kOut];
      for (int64_t i = 0; i < n; i += W) {
        const int64_t some = least(W, n - i);
        const Vec xv = lanes(xs + i * steps[kX], some, steps[kX]);
        const Vec fv = lanes(fuses + i * steps[kFuse], some, steps[kFuse]);
        const Vec gv = lanes(gates + i * steps[kGate], some, steps[kGate]);
        put(outs + i * steps[kOut], blend(xv, fv, gv, mean, slope, offset), some, steps[kOut]);
      }
    });
  }

  void by_planes() const {
    parallel_for(batch * channels, most(1, kGrain / count), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) plane(i / channels, i % channels);
    });
  }

  // ---- lanes are channels -----------------------------------------------------------------------------------------

  int64_t padded() const { return (channels + W - 1) / W * W; }
  int64_t piece() const { return most((count + kMostPieces - 1) / kMostPieces, most(1, kGrain / channels)); }
  int64_t pieces() const { return (count + piece() - 1) / piece(); }
  // Sums and sums of squares of each piece; then the lines' means, slopes and offsets as floats.
  size_t bytes() const { return static_cast<size_t>(padded() * (2 * pieces() * 8 + 3 * 4)); }

  // Σd and Σd² of all channels over pixels [begin, end).
  void sum_up(int64_t b, int64_t begin, int64_t end, double* sums, double* squares) const {
    const T* first = gate + at(kGate, b, 0);
    const int64_t pixel = step(kGate), channel = views[kGate]->strides[1];
    for (int64_t c = 0; c < padded(); ++c) sums[c] = squares[c] = 0.0;
    pixels.rows(begin, end, [&](const int64_t* offset, int64_t n) {
      for (int64_t i = 0; i < n; i += kRun) {
        const int64_t run = least(kRun, n - i);
        for (int64_t c = 0; c < channels; c += W) {
          const int64_t some = least(W, channels - c);
          const T* p = first + offset[kGate] + i * pixel + c * channel;
          const Wide pivot(lanes(first + c * channel, some, channel));
          Moments moments{load(sums + c), load(squares + c)};
          for (int64_t k = 0; k < run; ++k) moments.add(lanes(p + k * pixel, some, channel), pivot);
          store(sums + c, moments.sum);
          store(squares + c, moments.squares);
        }
      }
    });
  }

  void blend_pixels(int64_t b, int64_t begin, int64_t end, const float* means) const {
    const float *slopes = means + padded(), *offsets = slopes + padded();
    const int64_t step_x = views[kX]->strides[1], step_fuse = views[kFuse]->strides[1];
    const int64_t step_gate = views[kGate]->strides[1], step_out = views[kOut]->strides[1];
    pixels.rows(begin, end, [&](const int64_t* first, int64_t n) {
      const T *xs = x + at(kX, b, 0) + first[kX], *fuses = fuse + at(kFuse, b, 0) + first[kFuse];
      const T* gates = gate + at(kGate, b, 0) + first[kGate];
      T* outs = out + at(kOut, b, 0) + first[kOut];
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < channels; c += W) {
          const int64_t some = least(W, channels - c);
          const Vec xv = lanes(xs + i * step(kX) + c * step_x, some, step_x);
          const Vec fv = lanes(fuses + i * step(kFuse) + c * step_fuse, some, step_fuse);
          const Vec gv = lanes(gates + i * step(kGate) + c * step_gate, some, step_gate);
          const Vec result = blend(xv, fv, gv, load(means + c), load(slopes + c), load(offsets + c));
          put(outs + i * step(kOut) + c * step_out, result, some, step_out);
        }
      }
    });
  }

  void by_pixels(double* space) const {
    float* means = reinterpret_cast<float*>(space + 2 * pieces() * padded());
    for (int64_t b = 0; b < batch; ++b) {
      parallel_for(pieces(), 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          double* sums = space + 2 * i * padded();
          sum_up(b, i * piece(), least(count, (i + 1) * piece()), sums, sums + padded());
        }
      });
      for (int64_t c = 0; c < padded(); ++c) {
        double sum = 0.0, squares = 0.0;
        for (int64_t i = 0; i < pieces(); ++i) {
          sum += space[2 * i * padded() + c];
          squares += space[(2 * i + 1) * padded() + c];
        }
        const double pivot = c < channels ? static_cast<double>(to_float(gate[at(kGate, b, c)])) : 0.0;
        const Line line(Spread(pivot, sum, squares, count), eps);
        means[c] = line.mean;
        means[padded() + c] = line.slope;
        means[2 * padded() + c] = line.offset;
      }
      parallel_for(count, most(1, kGrain / channels), threads,
                   [&](int64_t begin, int64_t end) { blend_pixels(b, begin, end, means); });
    }
  }

  void run(irt_status& status) const {
    if (batch * channels * count == 0) return;  // pointers may be null
    const bool channels_last = channels > 1 && views[kOut]->strides[1] == 1 && step(kOut) != 1;
    if (!channels_last) return by_planes();
    const Workspace space(channels > kMostChannels ? SIZE_MAX : bytes());
    if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the statistics");
    by_pixels(static_cast<double*>(space.data()));
  }
};

bool fits(const irt_view& a, const irt_view& b) {
  return a.ndim == 4 && b.ndim == 4 && a.dtype == b.dtype && !memcmp(a.sizes, b.sizes, 4 * sizeof a.sizes[0]);
}

// (x, fuse, gate, eps) -> out
void aot_gate(const irt_call& call, irt_status& status) {
  bool good = call.nargs == 4 && call.nouts == 1 && is_number_or_none(call.args[3]);
  for (int i = 0; i < 3 && good; ++i) {
    good = call.args[i].kind == IRT_TENSOR && fits(*call.args[i].tensors, call.outs[0]);
  }
  if (!good) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (x, fuse, gate, eps) and one output, all tensors (B, C, H, W) of one dtype");
  }
  const double eps = float_arg(call.args[3], 1e-9);
  switch (call.outs[0].dtype) {
    case IRT_F32: return Gate<float>(call, eps).run(status);
    case IRT_BF16: return Gate<bf16>(call, eps).run(status);
    case IRT_F16: return Gate<f16>(call, eps).run(status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(aot_gate)

}  // namespace irt::INPAINTRT_ISA
