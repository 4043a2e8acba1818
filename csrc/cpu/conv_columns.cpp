// Convolutions of few pixels with large filters, such as the innermost layers of a U-Net: pixels are the lanes.
//
// Where every weight is used for a few pixels only, turning filters into lanes costs more than the sums. Here filters
// are read as they lie in memory, once, and the few pixels are what is packed:
//
//   columns: for every channel and tap the pixels that all outputs read, [chunk][panel][channel and tap][pixel]
//   product: a tile of filters and one panel of pixels in registers; of a filter W weights at a time are copied to
//            where tiles expect them (as gemm.h's A), so that neither its length nor its dtype matters to the product,
//            and what is copied next is fetched meanwhile
//
// A chunk is some channels with all their taps. Whether its weights lie as [channel][tap] or [tap][channel] only
// changes the order in which columns are packed.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

template <class T>
struct ColumnsGeometry {
  using Lane = LaneOf<T>;
  static constexpr int64_t kUnit = W * Lane::kChannels;  // channels that are packed at a time

  Filters filters;
  int64_t inputs, units, taps;       // channels, kUnits of them
  int64_t area, columns;             // outputs of an image, of the batch
  int64_t width, panels, padded;     // vectors of a panel; all their columns
  int64_t chunk, chunks, block;      // units in a chunk, chunks, chunks whose columns stay near the core
  int64_t runs;                      // pieces in which a chunk's weights of one filter lie
  int64_t rows, pixels, row, plane;  // of a channel's image: rows, pixels of a residue, floats of a row and of all
  int64_t line;                      // floats of the columns of one weight, before they are packed
  int64_t outputs, items;            // vectors of outputs in an item of work, items
  int64_t total, finished;           // floats of the sums of one filter; of a row of outputs
  int threads;

  ColumnsGeometry(const Call& call) : filters(call) {
    inputs = call.inputs(), units = ceil_div(inputs, kUnit), taps = call.kernel_height() * call.kernel_width();
    area = call.height() * call.width(), columns = call.batch() * area;
    width = columns <= W ? 1 : kPanelVectors, panels = ceil_div(columns, width * W), padded = panels * width * W;
    chunk = least(units, most(1, kChunkLanes / (W * taps)));
    while (call.rest && call.x->sizes[1] / kUnit % chunk) --chunk;  // a chunk's weights are of one part
    chunks = ceil_div(units, chunk);
    block = most(1, kNear / (chunk * W * taps * padded));
    runs = Weights<T>(call).by_channels() ? 1 : taps;

    const int64_t count = call.stride * (call.width() - 1) + call.dilation * (call.kernel_width() - 1) + 1;
    rows = call.stride * (call.height() - 1) + call.dilation * (call.kernel_height() - 1) + 1;
    pixels = ceil_div(count, call.stride), row = ceil_div(call.stride * pixels, W) * W;
    plane = rows * row + W, line = padded + W;

    const int64_t all = ceil_div(filters.outputs, W), gates = call.gated ? 2 : 1;
    total = padded + W, finished = ceil_div(call.width(), W) * W * W;
    const int threads_wanted = threads_of(call, all);
    items = most(threads_wanted, ceil_div(all * gates * W * total, kNear));
    outputs = ceil_div(all, least(all, ceil_div(items, threads_wanted) * threads_wanted));
    items = ceil_div(all, outputs);
    threads = threads_of(call, most(items, units));
  }

  int64_t some_units(int64_t k) const { return least(chunk, units - k * chunk); }
  // Vectors of lanes in one run, and in all runs, of chunk k.
  int64_t run(int64_t k) const {
    const int64_t channels = least(some_units(k) * kUnit, inputs - k * chunk * kUnit);
    return ceil_div(runs == 1 ? channels * taps : channels, kUnit);
  }
  int64_t groups(int64_t k) const { return runs * run(k); }

  int64_t column_floats() const { return vectors(chunks * chunk * taps * W * padded); }
  int64_t packing_floats() const {
    return vectors(kUnit * plane) + 2 * vectors(row * W) + vectors(kUnit * taps * line);
  }
  int64_t copy_floats() const { return kTileRows * chunk * taps * W; }
  int64_t total_floats() const { return vectors(outputs * W * (filters.gated ? 2 : 1) * total); }
  int64_t working_floats() const { return vectors(copy_floats()) + total_floats() + 2 * finished; }
  int64_t thread_floats() const { return most(packing_floats(), working_floats()); }
  int64_t floats() const { return column_floats() + threads * thread_floats(); }

 private:
  static constexpr int64_t kChunkLanes = 384;  // 14 filters of so many lanes are 21 KB
  static constexpr int64_t kNear = 1 << 16;    // floats: a quarter of L2
};

// sums += the products of kRows filters, [vector][filter][lane], with kVectors of columns, [vector][lane][column], over
// vectors [g, stop) of lanes; a and b move on. fetch(g) is called once for each.
template <class Lane, int kRows, int kVectors, class Fetch>
IRT_INLINE void column_chain(const float*& a, const float*& b, int64_t g, int64_t stop, const Fetch& fetch,
                             Vec (&sums)[kRows][kVectors]) {
  for (; g < stop; ++g, a += kRows * W) {
    fetch(g);
#pragma GCC unroll 1
    for (int64_t c = 0; c < W; ++c, b += kVectors * W) {
      Vec columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value(a[r * W + c]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Lane::multiply_add(value, columns[v], sums[r][v]);
      }
    }
  }
}

// totals += the products over `groups` vectors of lanes, in chains.
template <class Lane, int kRows, int kVectors, class Fetch>
static inline void column_product(const float* a, const float* b, int64_t groups, float* totals, int64_t distance,
                                  const Fetch& fetch) {
  constexpr int64_t kGroups = Lane::kChannels == 1 ? kChain / W : int64_t{1} << 40;
  for (int64_t g = 0; g < groups; g += kGroups) {
    Vec sums[kRows][kVectors];
    column_chain<Lane, kRows, kVectors>(a, b, g, least(groups, g + kGroups), fetch, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = totals + r * distance + v * W;
        store(to, load(to) + sums[r][v]);
      }
    }
  }
}

template <class T>
class Columns {
 public:
  using Geometry = ColumnsGeometry<T>;
  using Lane = LaneOf<T>;

  Columns(const Call& call, const Geometry& g, float* space)
      : call_(call),
        g_(g),
        source_(call, true),
        finish_(call),
        weights_(call),
        columns_(space),
        scratch_(space + g.column_floats()) {}

  void run() {
    int packing = 0, working = 0;
    parallel_for(g_.units, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* scratch = scratch_of(packing);
      memset(scratch, 0, static_cast<size_t>(g_.packing_floats()) * sizeof(float));
      for (int64_t unit = begin; unit < end; ++unit) pack(unit, scratch);
    });
    parallel_for(g_.items, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* scratch = scratch_of(working);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * g_.outputs;
        item_of(first, least(g_.outputs, ceil_div(g_.filters.outputs, W) - first), scratch);
      }
    });
  }

 private:
  const Call& call_;
  const Geometry& g_;
  Source<T, Single> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  float *columns_, *scratch_;

  float* scratch_of(int& next) const {
    return scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
  }
  float* chunk_at(int64_t k) const { return columns_ + k * g_.chunk * g_.taps * W * g_.padded; }

  // ---- columns

  // Those of one unit of channels.
  void pack(int64_t unit, float* scratch) const {
    float* line = scratch + vectors(Geometry::kUnit * g_.plane);
    float* sorted = line + vectors(g_.row * W);
    float* lines = sorted + vectors(g_.row * W);
    for (int64_t b = 0; b < call_.batch(); ++b) {
      for (int64_t half = 0; half < Lane::kChannels; ++half) {
        hold(b, unit * Lane::kChannels + half, scratch + half * W * g_.plane, line, sorted);
      }
      for (int64_t c = 0; c < Geometry::kUnit; ++c) {
        for (int64_t t = 0; t < g_.taps; ++t) {
          const int64_t place = g_.runs == 1 ? c * g_.taps + t : t * Geometry::kUnit + c;
          gather(scratch + c * g_.plane, t, lines + place * g_.line + b * g_.area);
        }
      }
    }
    const int64_t k = unit / g_.chunk, local = unit % g_.chunk, lanes = g_.groups(k) * W, run = g_.run(k) * W;
    float* to = chunk_at(k);
    for (int64_t i = 0; i < g_.taps * W; ++i) {
      const int64_t lane = g_.runs == 1 ? local * g_.taps * W + i : i / W * run + local * W + i % W;
      if (lane >= lanes) break;
      const float* from = lines + i * Lane::kChannels * g_.line;
      const float* second = from + (Lane::kChannels - 1) * g_.line;
      for (int64_t p = 0; p < g_.panels; ++p) {
        for (int64_t v = 0; v < g_.width; ++v) {
          const int64_t column = (p * g_.width + v) * W;
          store(to + ((p * lanes + lane) * g_.width + v) * W, Lane::pack(load(from + column), load(second + column)));
        }
      }
    }
  }

  // One image of one block of channels, padded: [channel][row][residue of columns modulo the stride][pixel].
  void hold(int64_t b, int64_t block, float* planes, float* line, float* sorted) const {
    const int64_t step = call_.stride, count = step * (call_.width() - 1) + reach(call_.kernel_width()) + 1;
    for (int64_t y = 0; y < g_.rows; ++y) {
      if (block * W < g_.inputs) {
        source_.read(b, block, y - call_.top, -call_.left, count, line);
      } else {
        memset(line, 0, static_cast<size_t>(count * W) * sizeof(float));
      }
      for (int64_t i = 0; step > 1 && i < count; ++i) {
        store(sorted + (i % step * g_.pixels + i / step) * W, load(line + i * W));
      }
      for (int64_t x = 0; x < g_.row; x += W) {
        Vec square[W];
        for (int64_t i = 0; i < W; ++i) square[i] = load((step > 1 ? sorted : line) + (x + i) * W);
        transpose(square);
        for (int64_t c = 0; c < W; ++c) store(planes + c * g_.plane + y * g_.row + x, square[c]);
      }
    }
  }

  int64_t reach(int64_t kernel) const { return call_.dilation * (kernel - 1); }

  // What all outputs of an image read of one channel at one tap. Whole vectors are written: what is too much is
  // overwritten by the next row, or lies behind the columns.
  void gather(const float* plane, int64_t tap, float* to) const {
    const int64_t down = tap / call_.kernel_width() * call_.dilation,
                  right = tap % call_.kernel_width() * call_.dilation;
    const float* from = plane + down * g_.row + right % call_.stride * g_.pixels + right / call_.stride;
    for (int64_t y = 0; y < call_.height(); ++y, from += call_.stride * g_.row, to += call_.width()) {
      for (int64_t x = 0; x < call_.width(); x += W) store(to + x, load(from + x));
    }
  }

  // ---- products

  // Which filter is number i of those of `count` vectors of outputs from `first` on: features, then gates.
  struct Chosen {
    int64_t first, features, gates;  // gates: how far a gate is behind its feature

    int64_t operator()(int64_t i) const { return first + (i < features ? i : gates + i - features); }
  };

  void item_of(int64_t first, int64_t count, float* scratch) const {
    float* copy = scratch;
    float* totals = copy + vectors(g_.copy_floats());
    float* sums = totals + g_.total_floats();
    const Chosen chosen = {first * W, least(count * W, g_.filters.outputs - first * W), g_.filters.outputs};
    const int64_t filters = chosen.features * (call_.gated ? 2 : 1);
    memset(totals, 0, static_cast<size_t>(filters * g_.total) * sizeof(float));
    for (int64_t k = 0; k < g_.chunks; k += g_.block) {
      const int64_t stop = least(k + g_.block, g_.chunks);
      for (int64_t row = 0; row < filters;) {
        const int height = tile_height(filters - row);
        with_height(height, [&](auto h) {
          constexpr int kRows = decltype(h)::value;
          for (int64_t at = k; at < stop; ++at) {
            const bool last = at + 1 == stop;
            const int64_t next = least(last ? row + kRows : row, filters - kRows);  // whose weights are copied next
            tile<kRows>(chosen, row, at, next, last ? k : at + 1, copy, totals);
          }
        });
        row += height;
      }
    }
    finish(first, count, chosen.features, totals, sums);
  }

  int64_t first_channel(int64_t k) const { return k * g_.chunk * Geometry::kUnit; }
  // Where vector g of lanes of chunk k lies among the weights of a filter, from the chunk's first on.
  int64_t place(int64_t k, int64_t g, int64_t run) const {
    if (weights_.by_channels()) return g * Geometry::kUnit;
    const int64_t c = first_channel(k);
    return weights_.place(0, c + g % run * Geometry::kUnit, g / run) - weights_.place(0, c, 0);
  }
  template <int kRows>
  void find(const Chosen& chosen, int64_t row, int64_t k, const char* (&filters)[kRows]) const {
    for (int r = 0; r < kRows; ++r) filters[r] = weights_.at(chosen(row + r), first_channel(k), 0);
  }

  // The weights of a chunk → [vector of lanes][filter][lane]
  template <int kRows>
  void copy_weights(const char* const (&filters)[kRows], int64_t k, float* to) const {
    const int64_t run = g_.run(k), stride = weights_.by_channels() ? 1 : weights_.between_channels(first_channel(k));
    const int64_t channels = least(g_.some_units(k) * Geometry::kUnit, g_.inputs - first_channel(k));
    const int64_t length = g_.runs == 1 ? channels * g_.taps : channels;
    for (int64_t g = 0; g < g_.runs * run; ++g, to += kRows * W) {
      const int64_t at = place(k, g, run), left = length - (g_.runs == 1 ? g : g % run) * Geometry::kUnit;
      if (left >= Geometry::kUnit && stride == 1) {
        for (int r = 0; r < kRows; ++r) store(to + r * W, weights_.across(filters[r], at, Geometry::kUnit, 1));
      } else {
        const int64_t some = least(left, Geometry::kUnit);
        for (int r = 0; r < kRows; ++r) store(to + r * W, weights_.across(filters[r], at, some, stride));
      }
    }
  }

  // Filters [row, row + kRows) times the columns of chunk k; filters from `next` on and chunk `next_k` are fetched.
  template <int kRows>
  void tile(const Chosen& chosen, int64_t row, int64_t k, int64_t next, int64_t next_k, float* copy,
            float* totals) const {
    const char* filters[kRows];
    find(chosen, row, k, filters);
    copy_weights(filters, k, copy);
    find(chosen, next, next_k, filters);
    const int64_t groups = g_.groups(k), next_groups = g_.groups(next_k), next_run = g_.run(next_k);
    const auto fetch = [&](int64_t g) {
      if (g >= next_groups) return;
      const int64_t at = place(next_k, g, next_run);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) weights_.fetch(filters[r], at);
    };
    const float* columns = chunk_at(k);
    for (int64_t p = 0; p < g_.panels; ++p) {
      float* to = totals + row * g_.total + p * g_.width * W;
      const float* panel = columns + p * groups * W * g_.width * W;
      const auto none = [](int64_t) {};
      if (g_.width == 1) {
        column_product<Lane, kRows, 1>(copy, panel, groups, to, g_.total, fetch);
      } else if (p == 0) {
        column_product<Lane, kRows, kPanelVectors>(copy, panel, groups, to, g_.total, fetch);
      } else {
        column_product<Lane, kRows, kPanelVectors>(copy, panel, groups, to, g_.total, none);
      }
    }
  }

  // ---- outputs

  void finish(int64_t first, int64_t count, int64_t features, const float* totals, float* sums) const {
    float* gates = sums + g_.finished;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t filters = least(W, features - i * W);
      const float* from = totals + i * W * g_.total;
      for (int64_t b = 0; b < call_.batch(); ++b) {
        for (int64_t y = 0; y < call_.height(); ++y) {
          const int64_t column = b * g_.area + y * call_.width();
          turn(from + column, filters, sums);
          if (call_.gated) turn(from + features * g_.total + column, filters, gates);
          finish_(b, first + i, y, 0, call_.width(), sums, gates);
        }
      }
    }
  }

  // A row of outputs: filters of pixels → [pixel][lane]
  void turn(const float* from, int64_t filters, float* to) const {
    for (int64_t x = 0; x < call_.width(); x += W) {
      Vec square[W];
      for (int64_t f = 0; f < filters; ++f) square[f] = load(from + f * g_.total + x);
      transpose(square);
      for (int64_t i = 0; i < W; ++i) store(to + (x + i) * W, square[i]);
    }
  }
};

}  // namespace

void columns(const Call& call, irt_status& status) { run_for_dtype<Columns>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
