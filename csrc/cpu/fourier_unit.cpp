// fourier_unit on the CPU: rfft2, channel mix, bias, ReLU, irfft2, residual.
//
// Three stages over one spectrum that stays in the blocked layout of gemm.h throughout; no stack, permute or complex
// copy:
//
//   1. rows:     two rows of x are the real and imaginary part of one complex transform, then separated by symmetry
//   2. columns:  for each kx: transform over y, mix as a product points × 2C by 2C × 2Co, bias, ReLU, inverse over y.
//                A column of big-lama (64 × 384 floats) and the weights stay in L2 from the first step to the last.
//   3. rows:     two rows of spectrum make one complex inverse whose parts are two rows of the result, + residual
//
// Spectrum layout: [tile of kx][block of channels][re, im][point][lane], point = (kx in tile, y). Vectors hold
// channels; a row of NCHW data is transposed on its way in and out of stages 1 and 3, in registers.
//
// Transforms are unscaled. ReLU is positively homogeneous, so with N = h·w the two orthonormal scalings move into the
// product's end: irfft2(ReLU(W·rfft2(x)/N + b/√N)). Stage 1 leaves a factor of 2, which moves there, too.
#include <atomic>

#include "arena.h"
#include "fft.h"
#include "gemm.h"
#include "kernel.h"
#include "parallel.h"
#include "rows.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kGrain = 1 << 14;  // floats of spectrum a thread is worth waking for
constexpr int64_t kMostThreads = 1 << 10;

int64_t blocks(int64_t channels) { return (channels + W - 1) / W; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t vectors(int64_t floats) { return (floats + 15) / 16 * 16; }

// Sizes of a call, and the places in the workspace.
struct Geometry {
  int64_t batch, c, co, h, w, half;
  int64_t in_blocks, out_blocks;  // of channels
  int64_t columns, tiles;         // kx per tile
  int64_t points;                 // distance of groups, in points; odd, so that groups do not share cache sets
  int64_t tile_floats, weight_floats, table_floats, scratch_floats;
  int threads;

  // Whether the sizes below can be computed without overflow. What cannot would take terabytes.
  static bool fits(const irt_view& x, int64_t outputs) {
    constexpr int64_t kLongest = int64_t{1} << 28;
    constexpr double kMost = 0x1p40;  // floats of spectrum, and of weights
    const int64_t channels = most(x.sizes[1], outputs), h = x.sizes[2], w = x.sizes[3];
    const auto real = [](int64_t n) { return static_cast<double>(n); };
    return channels <= kLongest && h <= kLongest && w <= kLongest && real(channels) * real(h) * real(w) <= kMost &&
           real(x.sizes[1]) * real(outputs) <= kMost;
  }

  Geometry(const irt_view& x, int64_t outputs, int wanted) {
    batch = x.sizes[0], c = x.sizes[1], co = outputs, h = x.sizes[2], w = x.sizes[3], half = w / 2 + 1;
    in_blocks = blocks(c), out_blocks = blocks(co);
    // Each thread has scratch memory of its own: no more of them than a stage has items.
    const int64_t items = most(half, (h + 1) / 2 * most(in_blocks, out_blocks));
    threads = static_cast<int>(most(1, least(wanted, least(items, kMostThreads))));
    // Enough points that a tile of the product is filled, but no fewer tiles than threads.
    columns = most(1, least(most(1, 2 * kTileRows / h), half / threads));
    tiles = (half + columns - 1) / columns;
    points = columns * h | 1;
    tile_floats = 2 * most(in_blocks, out_blocks) * points * W;
    weight_floats = 2 * c * out_blocks * kPanelColumns + 2 * out_blocks * W;  // and the bias
    table_floats = vectors(Fft::table_floats(w)) + vectors(Fft::table_floats(h));
    const int64_t fft = most(Fft::scratch_floats(w), Fft::scratch_floats(h));
    scratch_floats = fft + most(2 * out_blocks * points * W, 4 * w * W);
  }
  int64_t floats() const {
    return vectors(tiles * tile_floats) + vectors(weight_floats) + table_floats + threads * vectors(scratch_floats);
  }
};

static_assert(kPanelVectors == 2, "a panel of the product is the real and the imaginary part of one block of outputs");

template <class T>
class Unit {
 public:
  Unit(const irt_call& call, const Geometry& g, float* space)
      : g_(g),
        x_(*call.args[0].tensors),
        out_(call.outs[0]),
        residual_(call.args[3].kind == IRT_TENSOR ? call.args[3].tensors : nullptr),
        spectrum_(space),
        weight_(spectrum_ + vectors(g.tiles * g.tile_floats)),
        bias_(weight_ + 2 * g.c * g.out_blocks * kPanelColumns),
        tables_(weight_ + vectors(g.weight_floats)),
        scratch_(tables_ + g.table_floats),
        rows_(g.w, tables_, scratch_),
        columns_(g.h, tables_ + vectors(Fft::table_floats(g.w)), scratch_) {
    const irt_view& weight = *call.args[1].tensors;
    const irt_view* bias = call.args[2].kind == IRT_TENSOR ? call.args[2].tensors : nullptr;
    weight.dtype == IRT_F32 ? pack<float>(weight, bias) : pack<T>(weight, bias);
  }

  void run() {
    const int64_t pairs = (g_.h + 1) / 2;
    for (int64_t b = 0; b < g_.batch; ++b) {
      share(pairs * g_.in_blocks, 4 * g_.w * W,
            [&](int64_t i, float* scratch) { forward_rows(b, 2 * (i / g_.in_blocks), i % g_.in_blocks, scratch); });
      share(g_.tiles, g_.tile_floats, [&](int64_t tile, float* scratch) { mix(tile, scratch); });
      share(pairs * g_.out_blocks, 4 * g_.w * W,
            [&](int64_t i, float* scratch) { inverse_rows(b, 2 * (i / g_.out_blocks), i % g_.out_blocks, scratch); });
    }
  }

 private:
  const Geometry& g_;
  const irt_view &x_, &out_;
  const irt_view* residual_;
  float *spectrum_, *weight_, *bias_, *tables_, *scratch_;
  const Fft rows_, columns_;

  // body(item, scratch of this thread) for all items.
  template <class Body>
  void share(int64_t items, int64_t floats, const Body& body) {
    std::atomic<int> next{0};
    parallel_for(items, most(1, kGrain / floats), g_.threads, [&](int64_t begin, int64_t end) {
      float* scratch = scratch_ + next.fetch_add(1) * vectors(g_.scratch_floats);
      for (int64_t i = begin; i < end; ++i) body(i, scratch);
    });
  }

  // Element (y, kx) of a block of channels.
  Planes at(int64_t block, int64_t y, int64_t kx) const {
    const int64_t point = kx % g_.columns * g_.h + y;
    float* re = spectrum_ + kx / g_.columns * g_.tile_floats + (2 * block * g_.points + point) * W;
    return {re, re + g_.points * W};
  }

  // ---- weights: row 2o + r, column 2c + i → [o / W][c / W][i][c % W] as a row of W real and W imaginary outputs

  // Of dtype P, as the bias: float32, or x's.
  template <class P>
  void pack(const irt_view& weight, const irt_view* bias) {
    const int64_t panel = 2 * g_.c * kPanelColumns;
    parallel_for(g_.out_blocks, most(1, kGrain / panel), g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) pack_panel<P>(weight, o, weight_ + o * panel);
    });
    const P* values = bias ? static_cast<const P*>(bias->data) : nullptr;
    const double scale = 1.0 / std::sqrt(static_cast<double>(g_.h) * static_cast<double>(g_.w));
    for (int64_t o = 0; o < g_.out_blocks * W; ++o) {
      for (int64_t part = 0; part < 2; ++part) {
        const bool there = values && o < g_.co;
        bias_[(o / W * 2 + part) * W + o % W] =
            there ? static_cast<float>(scale * to_float(values[(2 * o + part) * bias->strides[0]])) : 0.0f;
      }
    }
  }

  template <class P>
  void pack_panel(const irt_view& weight, int64_t o, float* panel) const {
    const int64_t row = weight.strides[0], column = weight.strides[1], outputs = least(W, g_.co - o * W);
    const P* first = static_cast<const P*>(weight.data) + 2 * o * W * row;
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t j = 0; j < 2 * g_.c; j += W) {
        Vec lanes[W];
        const int64_t some = least(W, 2 * g_.c - j);
        for (int64_t lane = 0; lane < outputs; ++lane) {
          const P* from = first + (2 * lane + part) * row + j * column;
          lanes[lane] = some == W && column == 1 ? load(from) : load_some(from, some, column);
        }
        transpose(lanes);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t c = (j + i) / 2, in_block = least(W, g_.c - c / W * W);
          const int64_t k = c / W * 2 * W + (j + i) % 2 * in_block + c % W;
          store(panel + k * kPanelColumns + part * W, lanes[i]);
        }
      }
    }
  }

  // ---- stages

  void forward_rows(int64_t b, int64_t y, int64_t block, float* scratch) const {
    const Planes z = {scratch, scratch + g_.w * W};
    read_row(row_of<const T>(x_, b, block, y), g_.w, z.re);
    if (y + 1 < g_.h) {
      read_row(row_of<const T>(x_, b, block, y + 1), g_.w, z.im);
    } else {
      for (int64_t i = 0; i < g_.w; ++i) store(z.im + i * W, Vec(0.0f));
    }
    rows_.run(z, z, scratch + 2 * g_.w * W);
    for (int64_t kx = 0; kx < g_.half; ++kx) {
      const Complex a = z.get(kx), m = z.get(kx ? g_.w - kx : 0);  // row y: (a + conj m)/2; row y + 1: (a − conj m)/2i
      const Planes to = at(block, y, kx);
      to.put(0, {a.re + m.re, a.im - m.im});
      if (y + 1 < g_.h) to.put(1, {a.im + m.im, m.re - a.re});
    }
  }

  void mix(int64_t tile, float* scratch) const {
    float* results = scratch;
    float* fft = scratch + 2 * g_.out_blocks * g_.points * W;
    const int64_t first = tile * g_.columns, count = least(g_.columns, g_.half - first);
    for (int64_t block = 0; block < g_.in_blocks; ++block) {
      for (int64_t kx = first; kx < first + count; ++kx) {
        const Planes column = at(block, 0, kx);
        columns_.run(column, column, fft);
      }
    }
    const int tail = static_cast<int>(g_.c - (g_.in_blocks - 1) * W);
    const Blocks a = {at(0, 0, first).re, g_.points * W, static_cast<int>(2 * g_.in_blocks), 2, tail};
    const Vec scale(static_cast<float>(0.5 / (static_cast<double>(g_.h) * static_cast<double>(g_.w))));
    gemm(a, count * g_.h, weight_, static_cast<int>(g_.out_blocks), [&](int panel, int64_t row, int v, Vec sums) {
      const int64_t group = 2 * panel + v;
      const Vec y = at_least(Vec(0.0f), fma(sums, scale, load(bias_ + group * W)));
      store(results + (group * g_.points + row) * W, y);
    });
    for (int64_t block = 0; block < g_.out_blocks; ++block) {
      float* re = results + 2 * block * g_.points * W;
      for (int64_t kx = first; kx < first + count; ++kx) {
        const Planes column = {re + (kx - first) * g_.h * W, re + (g_.points + (kx - first) * g_.h) * W};
        columns_.run(column.exchanged(), at(block, 0, kx).exchanged(), fft);
      }
    }
  }

  void inverse_rows(int64_t b, int64_t y, int64_t block, float* scratch) const {
    const Planes z = {scratch, scratch + g_.w * W};
    const bool two = y + 1 < g_.h;
    for (int64_t kx = 0; kx < g_.half; ++kx) {
      const Planes from = at(block, y, kx);
      const Complex p = from.get(0), q = two ? from.get(1) : Complex{};
      if (kx == 0 || 2 * kx == g_.w) {  // numpy's rule: the imaginary part of these bins does not count
        z.put(kx, {p.re, q.re});
      } else {
        z.put(kx, {p.re - q.im, p.im + q.re});  // p + iq and, below the real axis, conj p + i·conj q
        z.put(g_.w - kx, {p.re + q.im, q.re - p.im});
      }
    }
    rows_.run(z.exchanged(), z.exchanged(), scratch + 2 * g_.w * W);
    for (int64_t i = 0; i < (two ? 2 : 1); ++i) {
      const Row<T> extra = residual_ ? row_of<T>(*residual_, b, block, y + i) : Row<T>{};
      write_row(i ? z.im : z.re, g_.w, extra, row_of<T>(out_, b, block, y + i),
                [](Vec v, Vec more) { return v + more; });
    }
  }
};

template <class T>
void run(const irt_call& call, irt_status& status) {
  const irt_view& x = *call.args[0].tensors;
  const int64_t outputs = call.outs[0].sizes[1];
  if (!Geometry::fits(x, outputs)) return fail(status, IRT_OUT_OF_MEMORY, "the spectrum would take terabytes");
  const Geometry g(x, outputs, call.threads);
  const Workspace space(static_cast<size_t>(g.floats()) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the spectrum");
  Unit<T>(call, g, static_cast<float*>(space.data())).run();
}

bool is_shape(const irt_view& view, int64_t b, int64_t c, int64_t h, int64_t w) {
  return view.ndim == 4 && view.sizes[0] == b && view.sizes[1] == c && view.sizes[2] == h && view.sizes[3] == w;
}

// (x, weight, bias | none, residual | none) -> out
void fourier_unit(const irt_call& call, irt_status& status) {
  const irt_view* x = tensor_arg(call, 0, status);
  const irt_view* weight = x ? tensor_arg(call, 1, status) : nullptr;
  if (!weight) return;
  const auto optional = [&](int i) { return call.args[i].kind == IRT_NONE || call.args[i].kind == IRT_TENSOR; };
  const char* expected =
      "expected x (B, C, h, w), weight (2 Co, 2 C[, 1, 1]), bias (2 Co) or none, residual (B, Co, h, w) or none and "
      "one output (B, Co, h, w), all of one dtype; weight and bias may both be float32";
  if (call.nargs != 4 || call.nouts != 1 || !optional(2) || !optional(3) || x->ndim != 4 || weight->ndim < 2) {
    return fail(status, IRT_BAD_ARGUMENT, expected);
  }
  const irt_view& out = call.outs[0];
  const int64_t *size = x->sizes, outputs = weight->sizes[0] / 2;
  bool good = size[1] > 0 && size[2] > 0 && size[3] > 0 && outputs > 0 && weight->sizes[0] == 2 * outputs &&
              weight->sizes[1] == 2 * size[1] && (weight->dtype == x->dtype || weight->dtype == IRT_F32) &&
              out.dtype == x->dtype && is_shape(out, size[0], outputs, size[2], size[3]);
  for (int d = 2; d < weight->ndim; ++d) good = good && weight->sizes[d] == 1;
  if (call.args[2].kind == IRT_TENSOR) {
    const irt_view& bias = *call.args[2].tensors;
    good = good && bias.ndim == 1 && bias.sizes[0] == 2 * outputs && bias.dtype == weight->dtype;
  }
  if (call.args[3].kind == IRT_TENSOR) {
    const irt_view& residual = *call.args[3].tensors;
    good = good && residual.dtype == x->dtype && is_shape(residual, size[0], outputs, size[2], size[3]);
  }
  if (!good) return fail(status, IRT_BAD_ARGUMENT, expected);
  if (size[0] == 0) return;
  switch (x->dtype) {
    case IRT_F32: return run<float>(call, status);
    case IRT_BF16: return run<bf16>(call, status);
    case IRT_F16: return run<f16>(call, status);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(fourier_unit)

}  // namespace irt::INPAINTRT_ISA
