// Winograd's algorithm (winograd.h) along rows only, for large filters over few channels: a network's first layer.
//
// In two dimensions each product would be over the channels alone, and four of them are stored as often as they are
// multiplied. Here it is over channels and rows of the filter, which are summed directly:
//
//   strips:   the rows of the image that one row of outputs reads, transformed. Each is transformed once, for all rows
//             of outputs: [row][vector of channels][point][tile][lane]
//   products: one per point, tiles × (rows of the filter · Cin) × panel, for a few tiles at a time, whose sums are then
//             transformed back in L1.
//
// A row is cut where its strips would not stay near the core.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

constexpr int64_t kTilesAtOnce = 2 * kTileRows;
constexpr int64_t kStripFloats = 1 << 17;  // half of L2

template <class Form>
struct RowsGeometry {
  Filters filters;
  int64_t inputs, groups, panels;  // of inputs: all, vectors of them
  int64_t rows;                    // of the filter
  int64_t tiles, strips;           // tiles in a strip, strips side by side
  int64_t pixels;                  // of the image that a strip reads
  int64_t point, group, row;       // floats of a point's tiles (odd vectors), of a vector of channels, of a row
  int64_t packed;                  // floats of a panel's filters at one point
  int threads;

  explicit RowsGeometry(const Call& call) : filters(call) {
    constexpr int64_t m = Form::kOutputs, n = Form::kInputs;
    inputs = call.inputs(), groups = ceil_div(inputs, W), panels = ceil_div(filters.blocks, kPanelVectors);
    rows = call.kernel_height();
    const int64_t all = ceil_div(call.width(), m), most_tiles = most(1, kStripFloats / (rows * groups * n * W));
    strips = ceil_div(all, most_tiles), tiles = ceil_div(all, strips);
    pixels = m * tiles + Form::kTaps - 1;
    point = (tiles | 1) * W, group = n * point, row = groups * group;
    packed = rows * inputs * kPanelColumns;
    threads = threads_of(call, call.batch() * strips * call.height());
  }
  int64_t filter_floats() const { return vectors(panels * Form::kInputs * packed); }
  int64_t pack_floats() const { return vectors(rows * Form::kTaps * W); }
  int64_t sum_floats() const { return vectors(kPanelVectors * Form::kInputs * kTilesAtOnce * W); }
  int64_t out_floats() const { return vectors(kPanelVectors * Form::kOutputs * kTilesAtOnce * W); }
  int64_t thread_floats() const {
    return vectors(rows * row) + vectors(pixels * W) + pack_floats() + sum_floats() + out_floats();
  }
  int64_t floats() const { return filter_floats() + threads * thread_floats(); }
};

template <class Form, class T>
class Rows {
 public:
  using Geometry = RowsGeometry<Form>;

  Rows(const Call& call, const Geometry& g, float* space)
      : call_(call),
        g_(g),
        source_(call, true),
        finish_(call),
        weights_(call),
        filters_(space),
        scratch_(space + g.filter_floats()) {}
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  void run() {
    int packing = 0, working = 0;
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(packing);
      for (int64_t o = begin; o < end; ++o) pack(o, scratch.taps);
    });
    parallel_for(call_.batch() * g_.strips * call_.height(), 8, g_.threads, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(working);
      int64_t strip = -1, held = 0;  // the rows of that strip before `held` are there
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y = i % call_.height(), first = y - call_.top;
        if (i / call_.height() != strip) strip = i / call_.height(), held = first;
        for (; held < first + g_.rows; ++held) hold(strip, held, scratch);
        multiply(strip, y, scratch);
      }
    });
  }

 private:
  static constexpr int m = Form::kOutputs, n = Form::kInputs, r = Form::kTaps;
  struct Scratch {
    float *strip, *line, *taps, *sums, *outputs;
  };

  const Call& call_;
  const Geometry& g_;
  Source<T, Single> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  float *filters_, *scratch_;

  Scratch scratch_of(int& next) const {
    Scratch s{};
    s.strip = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
    s.line = s.strip + vectors(g_.rows * g_.row), s.taps = s.line + vectors(g_.pixels * W);
    s.sums = s.taps + g_.pack_floats(), s.outputs = s.sums + g_.sum_floats();
    return s;
  }

  // One vector of outputs: → [panel][point][row of the filter][Cin][panel's columns]
  void pack(int64_t o, float* taps) const {
    float* panel = filters_ + o / kPanelVectors * n * g_.packed + o % kPanelVectors * W;
    for (int64_t c = 0; c < g_.inputs; ++c) {
      weights_.read(o, c, 1, taps);
      for (int64_t i = 0; i < g_.rows; ++i) {
        Vec row[r], values[n];
        for (int k = 0; k < r; ++k) row[k] = load(taps + (i * r + k) * W);
        Form::filter(row, values);
        for (int p = 0; p < n; ++p) store(panel + p * g_.packed + (i * g_.inputs + c) * kPanelColumns, values[p]);
      }
    }
  }

  float* row_at(const Scratch& scratch, int64_t y) const { return scratch.strip + (y + call_.top) % g_.rows * g_.row; }

  // Transforms one row of the padded image.
  void hold(int64_t strip, int64_t y, const Scratch& scratch) const {
    const int64_t first = strip % g_.strips * g_.tiles * m - call_.left;
    for (int64_t group = 0; group < g_.groups; ++group) {
      source_.read(strip / g_.strips, group, y, first, g_.pixels, scratch.line);
      float* to = row_at(scratch, y) + group * g_.group;
      for (int64_t tile = 0; tile < g_.tiles; ++tile) {
        Vec pixels[n], values[n];
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) pixels[i] = load(scratch.line + (tile * m + i) * W);
        Form::input(pixels, values);
#pragma GCC unroll 8
        for (int p = 0; p < n; ++p) store(to + p * g_.point + tile * W, values[p]);
      }
    }
  }

  // One row of outputs.
  void multiply(int64_t strip, int64_t y, const Scratch& scratch) const {
    const int64_t begin = strip % g_.strips * g_.tiles, width = ceil_div(call_.width(), m);
    const int64_t count = least(g_.tiles, width - begin);
    const float* rows[kLongestKernel];  // that the filter's rows meet
    for (int64_t i = 0; i < g_.rows; ++i) rows[i] = row_at(scratch, y - call_.top + i);
    for (int64_t tile = 0; tile < count; tile += kTilesAtOnce) {
      const int64_t some = least(kTilesAtOnce, count - tile), first = (begin + tile) * m;
      for (int64_t panel = 0; panel < g_.panels; ++panel) {
        const float* filters = filters_ + panel * n * g_.packed;
        for (int p = 0; p < n; ++p, filters += g_.packed) {
          product(rows, p * g_.point + tile * W, some, filters, scratch.sums + p * kTilesAtOnce * W);
        }
        finish(strip / g_.strips, panel, y, first, least(some * m, call_.width() - first), some, scratch);
      }
    }
  }

  // The products at one point, of tiles that lie at `first` in the rows: → [vector][tile][lane], vectors n points apart
  void product(const float* const* rows, int64_t first, int64_t tiles, const float* filters, float* sums) const {
    const int tail = static_cast<int>(g_.inputs - (g_.groups - 1) * W);
    const Blocks shape = {nullptr, g_.group, static_cast<int>(g_.groups), 1, tail};
    const int64_t panel = g_.inputs * kPanelColumns;
    for (int64_t tile = 0; tile < tiles;) {
      const int height = tile_height(tiles - tile);
      const int64_t from = first + tile * W;
      with_height(height, [&](auto h) {
        sum_of_products<Single, decltype(h)::value>(
            shape, g_.rows, [&](int64_t i) { return Factors{rows[i] + from, filters + i * panel}; },
            [&](int r, int v, Vec sum) { store(sums + (v * n * kTilesAtOnce + tile + r) * W, sum); });
      });
      tile += height;
    }
  }

  void finish(int64_t b, int64_t panel, int64_t y, int64_t first, int64_t count, int64_t tiles,
              const Scratch& scratch) const {
    constexpr int64_t kLine = m * kTilesAtOnce * W;
    const int64_t step = g_.filters.gated ? 2 : 1;
    for (int64_t v = 0; v < kPanelVectors && panel * kPanelVectors + v < g_.filters.blocks; v += step) {
      for (int64_t k = 0; k < step; ++k) {
        collect(scratch.sums + (v + k) * n * kTilesAtOnce * W, tiles, scratch.outputs + k * kLine);
      }
      finish_(b, g_.filters.unit(panel * kPanelVectors + v), y, first, count, scratch.outputs, scratch.outputs + kLine);
    }
  }

  // Sums of one vector of outputs → [pixel][lane]
  static void collect(const float* sums, int64_t tiles, float* to) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec values[n], outputs[m];
#pragma GCC unroll 8
      for (int p = 0; p < n; ++p) values[p] = load(sums + (p * kTilesAtOnce + tile) * W);
      Form::output(values, outputs);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) store(to + (tile * m + i) * W, outputs[i]);
    }
  }
};

template <class Form>
void run_form(const Call& call, irt_status& status) {
  if (call.x->dtype == IRT_F32) return run_as<Rows<Form, float>>(call, status);
  if (call.x->dtype == IRT_BF16) return run_as<Rows<Form, bf16>>(call, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace

void rows_f45(const Call& call, irt_status& status) { run_form<winograd::F45>(call, status); }
void rows_f27(const Call& call, irt_status& status) { run_form<winograd::F27>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
