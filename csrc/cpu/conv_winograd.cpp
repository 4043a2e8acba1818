// Winograd's algorithm (winograd.h) for square convolutions of stride 1. Transforms and products are float, also of
// bf16 data, whose 8 bits would not bear the cancellation: what is stored in bf16 is the input and the output, as
// elsewhere.
//
//   filters:  G g Gᵀ of all filters, n² matrices Cin × Cout, packed for the product. Transformed on every call: a kept
//             copy would be four times the weights and could be stale.
//   blocks:   a few rows of tiles at a time, so that a block's n² matrices of inputs stay near the core, and of outputs
//             one panel at a time, whose n² matrices stay in L2:
//             Bᵀd B of all tiles and input channels → n² products tiles × Cin × panel → AᵀmA → finish
//
// Rows of the image come in as strips [n rows][pixel][lane], where padding is written once, and leave as strips of m
// rows. NCHW or NHWC makes no difference to anything in between (rows.h).
//
// A dilation of d is d × d convolutions of the image's subsampled grids. A row of tiles has one residue of rows modulo
// d and all residues of columns: its strips are whole rows of the image, d apart, and tiles read every d-th pixel of
// them.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

constexpr int64_t kTilesPerBlock = 32;  // 32 × 512 channels × 36 floats are 2.4 MB, and the products' heights are full

// Sizes, and the places in the workspace.
struct Sizes {
  Filters filters;
  int64_t inputs, in_blocks, panels;
  int64_t tiles_x, tiles_y, rows, blocks;            // rows of tiles in a block, blocks in an image
  int64_t in_pixels, out_pixels;                     // of a strip's row
  int64_t tiles;                                     // distance of groups, odd, so that groups do not share cache sets
  int64_t in_point, out_point, filter_point, strip;  // floats between the matrices, odd vectors likewise; of strips
  int threads;

  explicit Sizes(const Call& call) : filters(call), inputs(call.inputs()) {}
};

template <class Form>
struct WinogradGeometry : Sizes {
  static constexpr int64_t m = Form::kOutputs, n = Form::kInputs, kPoints = n * n;

  explicit WinogradGeometry(const Call& call) : Sizes(call) {
    const int64_t d = call.dilation, width = call.width();
    in_blocks = ceil_div(inputs, W), panels = ceil_div(filters.blocks, kPanelVectors);
    tiles_x = tiles_along(width, d, m), tiles_y = tiles_along(call.height(), d, m);
    const int64_t last =
        (ceil_div(ceil_div(width, d), m) - 1) * m * d + least(d, width) - 1;  // of tiles' first columns
    in_pixels = last + (n - 1) * d + 1, out_pixels = last + (m - 1) * d + 1;
    threads = threads_of(call, call.batch() * tiles_y);
    const int64_t wanted = ceil_div(tiles_y * tiles_x, kTilesPerBlock);
    blocks = least(tiles_y, ceil_div(most(wanted, 1), threads) * threads);  // as many for each thread
    rows = ceil_div(tiles_y, blocks);
    blocks = ceil_div(tiles_y, rows);
    tiles = rows * tiles_x | 1;
    in_point = (in_blocks * tiles | 1) * W, out_point = (kPanelVectors * tiles | 1) * W;
    filter_point = (panels * inputs * kPanelVectors | 1) * W;
    strip = most(n * in_pixels, (call.gated ? 2 : 1) * m * out_pixels) * W;
  }
  int64_t filter_floats() const { return vectors(kPoints * filter_point); }
  int64_t start_floats() const { return vectors(tiles_x); }
  int64_t thread_floats() const { return vectors(kPoints * (in_point + out_point) + strip); }
  int64_t floats() const { return filter_floats() + start_floats() + threads * thread_floats(); }
};

// The products of a block of tiles with one panel of filters, at all points; the same for all forms.
void multiply(const Sizes& g, int64_t points, int64_t tiles, const float* panel, const float* inputs, float* outputs) {
  const int tail = static_cast<int>(g.inputs - (g.in_blocks - 1) * W);
  for (int64_t p = 0; p < points; ++p) {
    const Blocks a = {inputs + p * g.in_point, g.tiles * W, static_cast<int>(g.in_blocks), 1, tail};
    float* to = outputs + p * g.out_point;
    gemm(a, tiles, panel + p * g.filter_point, 1,
         [&](int, int64_t tile, int v, Vec sums) { store(to + (v * g.tiles + tile) * W, sums); });
  }
}

template <class Form, class T>
class Winograd {
 public:
  using Geometry = WinogradGeometry<Form>;

  Winograd(const Call& call, const Geometry& g, float* space)
      : call_(call),
        g_(g),
        source_(call, true),
        finish_(call),
        weights_(call),
        filters_(space),
        starts_(reinterpret_cast<int32_t*>(space + g.filter_floats())),
        scratch_(space + g.filter_floats() + g.start_floats()) {}

  void run() {
    const int64_t d = call_.dilation;
    int32_t* start = starts_;
    for (int64_t r = 0; r < least(d, call_.width()); ++r) {
      for (int64_t x = r; x < call_.width(); x += m * d) *start++ = static_cast<int32_t>(x);
    }
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) transform_filters(o);
    });
    int next = 0;
    parallel_for(call_.batch() * g_.blocks, 1, g_.threads, [&](int64_t from, int64_t to) {
      float* inputs = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      float* outputs = inputs + kPoints * g_.in_point;
      float* strip = outputs + kPoints * g_.out_point;
      for (int64_t i = from; i < to; ++i) {
        const int64_t b = i / g_.blocks, first = i % g_.blocks * g_.rows, rows = least(g_.rows, g_.tiles_y - first);
        for (int64_t block = 0; block < g_.in_blocks; ++block) {
          for (int64_t r = 0; r < rows; ++r) transform_inputs(b, first + r, r, block, strip, inputs);
        }
        for (int64_t panel = 0; panel < g_.panels; ++panel) {
          multiply(g_, kPoints, rows * g_.tiles_x, filters_ + panel * g_.inputs * kPanelColumns, inputs, outputs);
          const int64_t begin = panel * kPanelVectors, end = least(begin + kPanelVectors, g_.filters.blocks);
          for (int64_t o = begin; o < end; o += call_.gated ? 2 : 1) {
            for (int64_t r = 0; r < rows; ++r) transform_outputs(b, first + r, r, o, strip, outputs);
          }
        }
      }
    });
  }

 private:
  static constexpr int m = Form::kOutputs, n = Form::kInputs, t = Form::kTaps;
  static constexpr int64_t kPoints = Geometry::kPoints;

  const Call& call_;
  const Geometry& g_;
  Source<T, Single> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  float* filters_;
  int32_t* starts_;  // the first column of each tile of a row
  float* scratch_;

  // The first row of outputs of a row of tiles.
  int64_t first_row(int64_t tile_y) const {
    const int64_t d = call_.dilation;
    int64_t residue = 0;
    for (;; ++residue) {
      const int64_t tiles = ceil_div(ceil_div(call_.height() - residue, d), m);
      if (tile_y < tiles) break;
      tile_y -= tiles;
    }
    return residue + tile_y * m * d;
  }

  // ---- filters: → [point][panel][Cin][panel's columns], one vector of outputs at a time

  void transform_filters(int64_t o) const {
    float* to = filters_ + (o / kPanelVectors * g_.inputs * kPanelVectors + o % kPanelVectors) * W;
    alignas(64) float taps[W * t * t * W];  // [channel][tap][lane]
    for (int64_t c = 0; c < g_.inputs; c += W) {
      const int64_t some = least(W, g_.inputs - c);
      weights_.read(o, c, some, taps);
      for (int64_t k = 0; k < some; ++k) {
        const float* at = taps + k * t * t * W;
        float* target = to + (c + k) * kPanelColumns;
        Vec half[n][t];
        for (int j = 0; j < t; ++j) {
          Vec column[t], result[n];
          for (int i = 0; i < t; ++i) column[i] = load(at + (t * i + j) * W);
          Form::filter(column, result);
          for (int i = 0; i < n; ++i) half[i][j] = result[i];
        }
        for (int i = 0; i < n; ++i) {
          Vec result[n];
          Form::filter(half[i], result);
          for (int j = 0; j < n; ++j) store(target + (n * i + j) * g_.filter_point, result[j]);
        }
      }
    }
  }

  // ---- inputs

  void transform_inputs(int64_t b, int64_t tile_y, int64_t r, int64_t block, float* strip, float* to) const {
    const int64_t d = call_.dilation, pixels = g_.in_pixels, y = first_row(tile_y) - call_.top;
    for (int64_t i = 0; i < n; ++i) {
      source_.read(b, block, y + i * d, -call_.left, pixels, strip + i * pixels * W);
    }
    float* target = to + (block * g_.tiles + r * g_.tiles_x) * W;
    for (int64_t tile = 0; tile < g_.tiles_x; ++tile) {
      const float* from = strip + starts_[tile] * W;
      winograd::transform_2d<n, n>(
          Form::input, [&](int i, int j) { return load(from + (i * pixels + j * d) * W); },
          [&](int i, int j, Vec v) { store(target + (n * i + j) * g_.in_point + tile * W, v); });
    }
  }

  // ---- outputs

  void transform_outputs(int64_t b, int64_t tile_y, int64_t r, int64_t o, float* strip, const float* from) const {
    const int64_t d = call_.dilation, pixels = g_.out_pixels, y = first_row(tile_y), half = m * pixels * W;
    const int64_t rows = least(m, ceil_div(call_.height() - y, d)), blocks = call_.gated ? 2 : 1;
    for (int64_t k = 0; k < blocks; ++k) {
      const float* source = from + ((o % kPanelVectors + k) * g_.tiles + r * g_.tiles_x) * W;
      for (int64_t tile = 0; tile < g_.tiles_x; ++tile) {
        float* to = strip + k * half + starts_[tile] * W;
        transform_tile(source + tile * W, [&](int i, int j, Vec v) { store(to + (i * pixels + j * d) * W, v); });
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* sums = strip + i * pixels * W;
      finish_(b, g_.filters.unit(o), y + i * d, 0, call_.width(), sums, sums + half);
    }
  }

  // n×n → m×m, so not the square transform_2d.
  template <class Put>
  void transform_tile(const float* from, const Put& put) const {
    Vec half[m][n];
#pragma GCC unroll 6
    for (int j = 0; j < n; ++j) {
      Vec column[n], result[m];
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) column[i] = load(from + (n * i + j) * g_.out_point);
      Form::output(column, result);
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) half[i][j] = result[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
      Vec result[m];
      Form::output(half[i], result);
#pragma GCC unroll 4
      for (int j = 0; j < m; ++j) put(i, j, result[j]);
    }
  }
};

template <class Form>
void run_form(const Call& call, irt_status& status) {
  if (call.x->dtype == IRT_F32) return run_as<Winograd<Form, float>>(call, status);
  if (call.x->dtype == IRT_BF16) return run_as<Winograd<Form, bf16>>(call, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace

void winograd_f43(const Call& call, irt_status& status) { run_form<winograd::F43>(call, status); }
void winograd_f23(const Call& call, irt_status& status) { run_form<winograd::F23>(call, status); }
void winograd_f25(const Call& call, irt_status& status) { run_form<winograd::F25>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
