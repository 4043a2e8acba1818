// Winograd's algorithm (winograd.h) for convolutions of stride 1, and by phases (conv_phases.h) for those of stride 2,
// transposed ones of stride 2 and those of doubled images. Transforms and products are float, also of bf16 data, whose
// 8 bits would not bear the cancellation: what is stored in bf16 is the input and the output, as elsewhere.
//
//   filters:  G g Gᵀ, n² matrices Cin × Cout, packed for the product. Transformed on every call: a kept copy would be
//             four times the weights and could be stale.
//   inputs:   Bᵀd B, n² matrices tiles × Cin
//   outputs:  n² products tiles × Cin × panel → AᵀmA → finish, one panel of filters at a time
//
// In one of two orders (Sizes::by_filters), which differ in what is there at once and in what threads share:
//
//   by tiles:    all filters, in memory that all threads read; then each thread takes a few rows of tiles at a time,
//                whose inputs stay near its core while the filters pass.
//   by filters:  the inputs of so many tiles that few groups of them make the call, likewise; then each thread takes a
//                panel at a time (or some of the tiles with it, where threads are more), whose filters are made for a
//                few channels before these are multiplied, and never leave its L2. For few tiles, where writing and
//                reading all filters is most of the work, and for filters that do not fit anywhere near: four times as
//                much as the weights.
//
// Rows of the image come in as strips [n rows][pixel][lane], where padding is written once, and leave as strips of m
// rows. NCHW or NHWC makes no difference to anything in between (rows.h).
//
// A dilation of d is d × d convolutions of the image's subsampled grids. A row of tiles has one residue of rows modulo
// d and all residues of columns: its strips are whole rows of the image, d apart, and tiles read every d-th pixel of
// them.
//
// A 1×1 convolution beside this one (Call::beside) has no use for transforms: its products are added to the strips of
// outputs while these are in L1, and its sum never is in memory. Nothing cancels in it, so that it multiplies pairs of
// bf16 data where the CPU does that (lanes.h).
//
// By phases, each phase has matrices of its own. All share the points, so that phases of inputs are summed as products,
// in one chain over phases and channels, and phases of outputs are products of the same transformed inputs. A phase
// with a tap less has a filter that is 0 at ∞ and leaves that point out: a stride of 2 takes 5 + 4 products of one
// dimension for four outputs of three taps (3·4 directly), 5 + 5 for four taps, 6 + 5 for five.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

// Of a block, by tiles: 16 × 512 channels × 36 floats are 1.2 MB. With 32 the products' heights are full and filters
// are read half as often; but inputs that leave L2 cost more, up to a sixth of the time, and none gained by it.
constexpr int64_t kTilesPerBlock = 16;
constexpr int64_t kManyFilters = 64;  // matrices: half as many blocks, each of which reads all, and half the chunks
constexpr int64_t kChunk = kChain;    // input channels whose filters are made at once: 36 × 64 × 32 floats are 0.3 MB

// Which number a matrix has: those of each pair of phases lie one after the other, row by row.
struct Grid {
  int64_t rows[Tiling::kMostPhases], columns[Tiling::kMostPhases], all = 0;

  // height(p) × width(q) matrices for each pair of phases.
  template <class Height, class Width>
  Grid(int64_t phases_y, int64_t phases_x, const Height& height, const Width& width) {
    for (int64_t p = 0; p < phases_y; ++p) rows[p] = height(p);
    for (int64_t q = 0; q < phases_x; ++q) columns[q] = width(q);
    for (int64_t p = 0; p < phases_y; ++p) {
      for (int64_t q = 0; q < phases_x; ++q) first_[p][q] = all, all += rows[p] * columns[q];
    }
  }
  int64_t at(int64_t p, int64_t q, int64_t i, int64_t j) const { return first_[p][q] + i * columns[q] + j; }

 private:
  int64_t first_[Tiling::kMostPhases][Tiling::kMostPhases];
};

// Sizes, and the places in the workspace.
struct Sizes {
  Tiling y, x;
  Filters filters;
  Grid in, out, values;  // the matrices of transformed inputs, of products and of transformed filters
  int64_t inputs, in_blocks, panels;
  bool by_filters;
  int64_t chunks, chunk;                             // of input channels: those of the filters that are there at once
  int64_t tiles_x, tiles_y, rows, blocks;            // rows of tiles in a block, blocks in all images
  int64_t in_pixels, out_pixels;                     // of a strip's row
  int64_t strips;                                    // of outputs that are made together, each of one vector
  int64_t shares, share;                             // by filters: of a block for as many threads, and a share's rows
  int64_t tiles, out_tiles;                          // distance of groups, odd, so that they do not share cache sets
  int64_t in_point, out_point, filter_point, strip;  // floats between the matrices, odd vectors likewise; of strips
  struct Beside {
    int64_t lanes = 0, blocks = 0, group = 0;  // of what it reads; floats between blocks of channels
  } beside;
  int threads;

  // m outputs from n inputs; what is beside is read with so many channels in a lane.
  Sizes(const Call& call, bool by_phases, int64_t m, int64_t n, int64_t channels)
      : y(call, 0, by_phases),
        x(call, 1, by_phases),
        filters(call),
        in(
            y.inputs, x.inputs, [&](int64_t p) { return y.inputs > 1 ? y.points(p, n) : n; },
            [&](int64_t q) { return x.inputs > 1 ? x.points(q, n) : n; }),
        out(
            y.outputs, x.outputs, [&](int64_t p) { return y.outputs > 1 ? y.points(p, n) : n; },
            [&](int64_t q) { return x.outputs > 1 ? x.points(q, n) : n; }),
        values(
            y.phases(), x.phases(), [&](int64_t p) { return y.values(p, n); },
            [&](int64_t q) { return x.values(q, n); }),
        inputs(call.inputs()) {
    const int64_t d = call.dilation;
    in_blocks = ceil_div(inputs, W), panels = ceil_div(filters.blocks, kPanelVectors);
    tiles_x = tiles_along(x.size, d, m), tiles_y = tiles_along(y.size, d, m);
    const int64_t last = (ceil_div(ceil_div(x.size, d), m) - 1) * m * d + least(d, x.size) - 1;  // of tiles' beginnings
    in_pixels = x.in_scale * (last + (n - 1) * d + 1);
    out_pixels = x.out_scale * (last + (m - 1) * d + 1) - x.out_first;
    const int64_t all_rows = call.batch() * tiles_y;
    by_filters = goes_by_filters(call, tiles_y * tiles_x, values.all);
    threads = threads_of(call, by_filters ? panels * all_rows : all_rows);
    const int64_t many = values.all > kManyFilters ? 2 : 1;
    const int64_t together = by_filters ? kTilesPerGroup : many * kTilesPerBlock;
    blocks = most(ceil_div(all_rows * tiles_x, together), 1);
    if (!by_filters) blocks = ceil_div(blocks, threads) * threads;  // as many for each thread
    rows = ceil_div(all_rows, least(blocks, all_rows));
    blocks = ceil_div(all_rows, rows);
    shares = by_filters ? least(rows, ceil_div(threads, panels)) : 1, share = ceil_div(rows, shares);
    chunk = by_filters ? least(inputs, kChunk / many) : inputs, chunks = ceil_div(inputs, chunk);
    tiles = rows * tiles_x | 1, out_tiles = share * tiles_x | 1;
    in_point = (ceil_div(chunk, W) * tiles | 1) * W, out_point = (kPanelVectors * out_tiles | 1) * W;
    filter_point = ((by_filters ? 1 : panels) * chunk * kPanelVectors | 1) * W;
    strips = call.gated || call.beside ? 2 : 1;
    strip = most(n * in_pixels, strips * m * out_pixels) * W;
    if (!call.beside) return;
    beside.lanes = ceil_div(call.beside->inputs(), channels), beside.blocks = ceil_div(beside.lanes, W);
    beside.group = (rows * m * call.width() | 1) * W;
  }
  int64_t filter_floats() const { return vectors(values.all * filter_point); }
  int64_t input_floats() const { return vectors(chunks * in.all * in_point) + vectors(beside.blocks * beside.group); }
  int64_t beside_filter_floats() const { return vectors(panels * beside.lanes * kPanelColumns); }
  int64_t start_floats() const { return vectors(tiles_x); }
  int64_t shared_floats() const { return by_filters ? input_floats() : filter_floats(); }
  int64_t thread_floats() const {
    return (by_filters ? filter_floats() : input_floats()) + vectors(out.all * out_point) + vectors(strip);
  }
  int64_t floats() const {
    return shared_floats() + start_floats() + beside_filter_floats() + threads * thread_floats();
  }
};

template <class Form, bool kPhases, class T>
struct WinogradGeometry : Sizes {
  explicit WinogradGeometry(const Call& call)
      : Sizes(call, kPhases, Form::kOutputs, Form::kInputs, LaneOf<T>::kChannels) {}
};

// The products of a block of tiles with one panel of filters, at all points; the same for all forms. Of channels
// [c, c + some) only: from the second of them on, they are added to what is there.
void multiply(const Sizes& g, int64_t tiles, int64_t c, int64_t some, const float* panel, const float* inputs,
              float* outputs) {
  const int64_t blocks = ceil_div(some, W);
  const Blocks shape = {nullptr, g.tiles * W, static_cast<int>(blocks), 1, static_cast<int>(some - (blocks - 1) * W)};
  Factors factors[Tiling::kMostPhases * Tiling::kMostPhases];
  // All phases of inputs that have point (i, j), for the outputs of phases p and q.
  const auto factors_at = [&](int64_t p, int64_t q, int64_t i, int64_t j) {
    int64_t count = 0;
    for (int64_t s = 0; s < g.y.inputs; ++s) {
      for (int64_t t = 0; t < g.x.inputs; ++t) {
        if (i >= g.in.rows[s] || j >= g.in.columns[t]) continue;
        const int64_t value = g.values.at(p + s, q + t, least(i, g.values.rows[p + s] - 1),  //
                                          least(j, g.values.columns[q + t] - 1));
        factors[count++] = {inputs + (c / g.chunk * g.in.all + g.in.at(s, t, i, j)) * g.in_point,
                            panel + value * g.filter_point};
      }
    }
    return count;
  };
  for (int64_t p = 0; p < g.y.outputs; ++p) {
    for (int64_t q = 0; q < g.x.outputs; ++q) {
      for (int64_t i = 0; i < g.out.rows[p]; ++i) {
        for (int64_t j = 0; j < g.out.columns[q]; ++j) {
          const int64_t count = factors_at(p, q, i, j);
          float* to = outputs + g.out.at(p, q, i, j) * g.out_point;
          if (c == 0) {
            gemm(shape, factors, count, tiles, 1,
                 [&](int, int64_t tile, int v, Vec sums) { store(to + (v * g.out_tiles + tile) * W, sums); });
          } else {
            gemm(shape, factors, count, tiles, 1, [&](int, int64_t tile, int v, Vec sums) {
              float* sum = to + (v * g.out_tiles + tile) * W;
              store(sum, load(sum) + sums);
            });
          }
        }
      }
    }
  }
}

// visit(all or all but one of n points, as a type)
template <int n, bool kPhases, class Visit>
void with_points(int64_t points, const Visit& visit) {
  if constexpr (kPhases) {
    if (points < n) return visit(Height<n - 1>());
  }
  visit(Height<n>());
}

template <class Form, bool kPhases, class T>
class Winograd {
 public:
  using Geometry = WinogradGeometry<Form, kPhases, T>;

  Winograd(const Call& call, const Geometry& g, float* space)
      : call_(kPhases && call.upsample > 1 ? of_stored(call) : call),
        g_(g),
        source_(call_, !kPhases),
        finish_(call_),
        weights_(call_),
        beside_(call_.beside ? *call_.beside : call_),
        shared_(space),
        starts_(reinterpret_cast<int32_t*>(space + g.shared_floats())),
        beside_filters_(space + g.shared_floats() + g.start_floats()),
        scratch_(beside_filters_ + g.beside_filter_floats()) {}
  Winograd(const Winograd&) = delete;
  Winograd& operator=(const Winograd&) = delete;

  void run() {
    const int64_t d = call_.dilation;
    int32_t* start = starts_;
    for (int64_t r = 0; r < least(d, g_.x.size); ++r) {
      for (int64_t u = r; u < g_.x.size; u += m * d) *start++ = static_cast<int32_t>(u);
    }
    g_.by_filters ? by_filters() : by_tiles();
  }

 private:
  static constexpr int m = Form::kOutputs, n = Form::kInputs, t = Form::kTaps;

  const Call call_;
  const Geometry& g_;
  Source<T, Single> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  struct Beside {  // where there is one
    Source<T> source;
    Weights<T> weights;

    explicit Beside(const Call& call) : source(call, false), weights(call) {}
  } beside_;
  float* shared_;          // transformed filters; by filters: inputs
  int32_t* starts_;        // where each tile of a row begins
  float* beside_filters_;  // as pointwise ones
  float* scratch_;

  void by_tiles() const {
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const int64_t panel = o / kPanelVectors * g_.inputs * kPanelColumns;
        transform_filters(o, 0, g_.inputs, shared_ + panel + o % kPanelVectors * W);
        pack_beside(o);
      }
    });
    int next = 0;
    parallel_for(g_.blocks, 1, g_.threads, [&](int64_t from, int64_t to) {
      float* inputs = scratch_of(next);
      float* outputs = inputs + g_.input_floats();
      float* strip = outputs + vectors(g_.out.all * g_.out_point);
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = i * g_.rows, rows = least(g_.rows, call_.batch() * g_.tiles_y - first);
        for (int64_t block = 0; block < g_.in_blocks; ++block) {
          for (int64_t r = 0; r < rows; ++r) transform_inputs(first + r, r, block, strip, inputs);
        }
        for (int64_t r = 0; r < rows; ++r) read_beside(first + r, r, inputs);
        for (int64_t panel = 0; panel < g_.panels; ++panel) {
          multiply(g_, rows * g_.tiles_x, 0, g_.inputs, shared_ + panel * g_.inputs * kPanelColumns, inputs, outputs);
          finish(panel, first, 0, rows, strip, inputs, outputs);
        }
      }
    });
  }

  void by_filters() const {
    if (call_.beside) {
      parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o) pack_beside(o);
      });
    }
    for (int64_t i = 0; i < g_.blocks; ++i) {
      const int64_t first = i * g_.rows, rows = least(g_.rows, call_.batch() * g_.tiles_y - first);
      int next = 0;
      parallel_for(g_.in_blocks * rows, 1, g_.threads, [&](int64_t from, int64_t to) {
        float* strip = scratch_of(next);
        for (int64_t k = from; k < to; ++k) {
          transform_inputs(first + k % rows, k % rows, k / rows, strip, shared_);
          if (k < rows) read_beside(first + k, k, shared_);
        }
      });
      next = 0;
      parallel_for(g_.panels * g_.shares, 1, g_.threads, [&](int64_t from, int64_t to) {
        float* filters = scratch_of(next);
        float* outputs = filters + g_.filter_floats();
        float* strip = outputs + vectors(g_.out.all * g_.out_point);
        for (int64_t k = from; k < to; ++k) {
          const int64_t panel = k / g_.shares, begin = k % g_.shares * g_.share,
                        some_rows = least(g_.share, rows - begin);
          if (some_rows <= 0) continue;
          const float* inputs = shared_ + begin * g_.tiles_x * W;
          for (int64_t c = 0; c < g_.inputs; c += g_.chunk) {
            const int64_t some = least(g_.chunk, g_.inputs - c);
            for (int64_t v = 0; v < kPanelVectors; ++v) {
              transform_filters(panel * kPanelVectors + v, c, some, filters + v * W);
            }
            multiply(g_, some_rows * g_.tiles_x, c, some, filters, inputs, outputs);
          }
          finish(panel, first, begin, some_rows, strip, shared_, outputs);
        }
      });
    }
  }

  float* scratch_of(int& next) const {
    return scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
  }

  // Rows [begin, begin + rows) of tiles of a block that begins at `first`.
  void finish(int64_t panel, int64_t first, int64_t begin, int64_t rows, float* strip, const float* inputs,
              const float* outputs) const {
    const int64_t end = least((panel + 1) * kPanelVectors, g_.filters.blocks);
    for (int64_t o = panel * kPanelVectors; o < end; o += g_.strips) {
      for (int64_t r = begin; r < begin + rows; ++r) {
        transform_outputs(first + r, r - begin, o, strip, outputs, beside_pixels(inputs, r));
      }
    }
  }

  // Where a row of tiles begins.
  int64_t start_of_row(int64_t tile_y) const {
    const int64_t d = call_.dilation;
    int64_t residue = 0;
    for (;; ++residue) {
      const int64_t tiles = ceil_div(ceil_div(g_.y.size - residue, d), m);
      if (tile_y < tiles) break;
      tile_y -= tiles;
    }
    return residue + tile_y * m * d;
  }

  // ---- filters: → [matrix][panel][Cin][panel's columns], one vector of outputs at a time

  // Channels [first, first + count) of one vector of outputs.
  void transform_filters(int64_t o, int64_t first, int64_t count, float* to) const {
    constexpr int64_t kMostTaps = kPhases ? Tiling::kLongest * Tiling::kLongest : t * t;
    const int64_t kernel = call_.kernel_height() * call_.kernel_width();
    alignas(64) float taps[W * kMostTaps * W];  // [channel][tap][lane]
    for (int64_t c = 0; c < count; c += W) {
      const int64_t some = least(W, count - c);
      weights_.read(o, first + c, some, taps);
      for (int64_t k = 0; k < some; ++k) {
        const float* from = taps + k * kernel * W;
        float* target = to + (c + k) * kPanelColumns;
        if constexpr (kPhases) {
          transform_phases(from, target);
        } else {
          transform_filter([&](int i, int j) { return load(from + (t * i + j) * W); }, 0, 0, target);
        }
      }
    }
  }

  // A filter's taps in each pair of phases: those that read the same pixel are summed.
  void transform_phases(const float* from, float* to) const {
    for (int64_t p = 0; p < g_.y.phases(); ++p) {
      for (int64_t q = 0; q < g_.x.phases(); ++q) {
        Vec taps[t][t];
        for (int64_t i = 0; i < call_.kernel_height(); ++i) {
          for (int64_t j = 0; j < call_.kernel_width(); ++j) {
            const int row = g_.y.tap[p][i], column = g_.x.tap[q][j];
            if (row < 0 || column < 0) continue;
            taps[row][column] = taps[row][column] + load(from + (i * call_.kernel_width() + j) * W);
          }
        }
        transform_filter([&](int i, int j) { return taps[i][j]; }, p, q, to);
      }
    }
  }

  template <class Get>
  void transform_filter(const Get& get, int64_t p, int64_t q, float* to) const {
    winograd::transform_2d<t, n>(Form::filter, get, [&](int i, int j, Vec v) {
      if (kPhases && (i >= g_.values.rows[p] || j >= g_.values.columns[q])) return;
      store(to + g_.values.at(p, q, i, j) * g_.filter_point, v);
    });
  }

  // ---- inputs

  void transform_inputs(int64_t tile_row, int64_t r, int64_t block, float* strip, float* to) const {
    const int64_t b = tile_row / g_.tiles_y, tile_y = tile_row % g_.tiles_y;
    const int64_t d = g_.y.in_scale * call_.dilation, pixels = g_.in_pixels;
    const int64_t first = g_.y.in_scale * start_of_row(tile_y) + g_.y.in_first;
    const int64_t chunk = block * W / g_.chunk;
    float* target =
        to + chunk * g_.in.all * g_.in_point + ((block - chunk * g_.chunk / W) * g_.tiles + r * g_.tiles_x) * W;
    for (int64_t p = 0; p < g_.y.inputs; ++p) {
      for (int64_t i = 0; i < g_.in.rows[p]; ++i) {
        source_.read(b, block, first + i * d + p, g_.x.in_first, pixels, strip + i * pixels * W);
      }
      for (int64_t q = 0; q < g_.x.inputs; ++q) {
        with_points<n, kPhases>(g_.in.rows[p], [&](auto rows) {
          with_points<n, kPhases>(g_.in.columns[q], [&](auto columns) {
            transform_phase<decltype(rows)::value, decltype(columns)::value>(
                strip + q * W, d, target + g_.in.at(p, q, 0, 0) * g_.in_point);
          });
        });
      }
    }
  }

  // Without the last row or column where that is ∞.
  template <int kRows, int kColumns>
  void transform_phase(const float* strip, int64_t d, float* to) const {
    const int64_t tiles = g_.tiles_x, scale = g_.x.in_scale, row = g_.in_pixels, point = g_.in_point;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* from = strip + starts_[tile] * scale * W;
      float* target = to + tile * W;
      winograd::transform_2d<n, n>(
          Form::input,
          [=](int i, int j) { return i < kRows && j < kColumns ? load(from + (i * row + j * d) * W) : Vec(0.0f); },
          [=](int i, int j, Vec v) {
            if (i < kRows && j < kColumns) store(target + (kColumns * i + j) * point, v);
          });
    }
  }

  // ---- what is beside: filters → [panel][channel][panel's columns], pixels → [block][row of tiles][row][pixel][lane]

  void pack_beside(int64_t o) const {
    const int64_t place = o / kPanelVectors * g_.beside.lanes * kPanelVectors + o % kPanelVectors;
    if (call_.beside) pack_pointwise(beside_.weights, o, call_.beside->inputs(), beside_filters_ + place * W);
  }

  float* beside_pixels(const float* inputs, int64_t r) const {
    return const_cast<float*>(inputs) + vectors(g_.chunks * g_.in.all * g_.in_point) + r * m * call_.width() * W;
  }

  void read_beside(int64_t tile_row, int64_t r, float* inputs) const {
    if (!call_.beside) return;
    const int64_t b = tile_row / g_.tiles_y, first = start_of_row(tile_row % g_.tiles_y), width = call_.width();
    for (int64_t block = 0; block < g_.beside.blocks; ++block) {
      float* to = beside_pixels(inputs, r) + block * g_.beside.group;
      for (int64_t i = 0, y = first; i < m && y < call_.height(); ++i, y += call_.dilation) {
        beside_.source.read(b, block, y, 0, width, to + i * width * W);
      }
    }
  }

  // sums += row i of the pixels · a panel of the filters.
  void add_beside(const float* pixels, int64_t i, int64_t panel, float* sums, int64_t half) const {
    const int64_t width = call_.width();
    const int tail = static_cast<int>(g_.beside.lanes - (g_.beside.blocks - 1) * W);
    const Blocks row = {pixels + i * width * W, g_.beside.group, static_cast<int>(g_.beside.blocks), 1, tail};
    gemm<LaneOf<T>>(row, width, beside_filters_ + panel * panel_floats(row), 1,
                    [&](int, int64_t pixel, int v, Vec more) {
                      float* sum = sums + v * half + pixel * W;
                      store(sum, load(sum) + more);
                    });
  }

  // ---- outputs

  void transform_outputs(int64_t tile_row, int64_t r, int64_t o, float* strip, const float* from,
                         const float* beside) const {
    const int64_t b = tile_row / g_.tiles_y, tile_y = tile_row % g_.tiles_y;
    const int64_t d = g_.y.out_scale * call_.dilation, pixels = g_.out_pixels, half = m * pixels * W;
    const int64_t first = g_.y.out_scale * start_of_row(tile_y) + g_.y.out_first;
    const int64_t blocks = least(g_.strips, g_.filters.blocks - o);
    for (int64_t p = 0; p < g_.y.outputs; ++p) {
      for (int64_t k = 0; k < blocks; ++k) {
        const float* source = from + ((o % kPanelVectors + k) * g_.out_tiles + r * g_.tiles_x) * W;
        for (int64_t q = 0; q < g_.x.outputs; ++q) {
          with_points<n, kPhases>(g_.out.rows[p], [&](auto rows) {
            with_points<n, kPhases>(g_.out.columns[q], [&](auto columns) {
              collect_phase<decltype(rows)::value, decltype(columns)::value>(
                  source + g_.out.at(p, q, 0, 0) * g_.out_point, d, strip + k * half + g_.x.offset[q] * W);
            });
          });
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t y = first + g_.y.offset[p] + i * d;
        if (y < 0 || y >= call_.height()) continue;
        float* sums = strip + (i * pixels - g_.x.out_first) * W;
        if (call_.beside) add_beside(beside, i, o / kPanelVectors, sums, half);
        for (int64_t k = 0; k < (call_.gated ? 1 : blocks); ++k) {
          finish_(b, g_.filters.unit(o + k), y, 0, call_.width(), sums + k * half, sums + half);
        }
      }
    }
  }

  template <int kRows, int kColumns>
  void collect_phase(const float* from, int64_t d, float* strip) const {
    const int64_t tiles = g_.tiles_x, scale = g_.x.out_scale, row = g_.out_pixels, point = g_.out_point;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* source = from + tile * W;
      float* to = strip + starts_[tile] * scale * W;
      winograd::transform_2d<n, m>(
          Form::output,
          [=](int i, int j) {
            return i < kRows && j < kColumns ? load(source + (kColumns * i + j) * point) : Vec(0.0f);
          },
          [=](int i, int j, Vec v) { store(to + (i * row + j * d) * W, v); });
    }
  }
};

template <class Form, bool kPhases = false>
void run_form(const Call& call, irt_status& status) {
  if (call.x->dtype == IRT_F32) return run_as<Winograd<Form, kPhases, float>>(call, status);
  if (call.x->dtype == IRT_BF16) return run_as<Winograd<Form, kPhases, bf16>>(call, status);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

}  // namespace

void winograd_f43(const Call& call, irt_status& status) { run_form<winograd::F43>(call, status); }
void winograd_f23(const Call& call, irt_status& status) { run_form<winograd::F23>(call, status); }
void winograd_f25(const Call& call, irt_status& status) { run_form<winograd::F25>(call, status); }
void winograd_f42_phases(const Call& call, irt_status& status) { run_form<winograd::F42, true>(call, status); }
void winograd_f43_phases(const Call& call, irt_status& status) { run_form<winograd::F43, true>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
