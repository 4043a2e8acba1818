// The direct form, for any kernel, stride and dilation: sums over taps and channels of strips of the image that lie
// near the core.
//
//   strips:  the rows of the image that a few rows of outputs read, [group of channels][row][residue][pixel][lane],
//            with padding in place. Columns are sorted by their residue modulo the stride, so that whatever the stride
//            is, neighbouring outputs read neighbouring pixels: the product's rows are always one cache line apart
//            (gemm.h).
//   product: a tile of pixels and one panel of filters stay in registers over all taps and channels.
//
// Upsampled and transposed convolutions are P × P phases: outputs (P·Y + p, P·X + q) are a convolution of their own, of
// the image as it is stored, with few of the taps. Nearest-2x with 3×3 filters has four phases of 2×2 taps, each the
// sum of the filters' taps that read the same pixel; a transposed convolution of stride 2 has each tap in one phase.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_phases.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

template <class T>
struct DirectGeometry {
  using Lane = LaneOf<T>;
  Axis rows, columns;
  Filters filters;
  int64_t lanes, groups, panels;             // of inputs; blocks of those; panels of filters
  int64_t height, width;                     // of one phase of outputs
  int64_t block, blocks;                     // rows of a phase in an item of work, items in an image
  int64_t slots, pixels, row, group, image;  // of strips: rows, pixels of a residue, floats of a row, group and image
  int64_t most_taps, all_taps;               // of a phase, of all phases
  int64_t packed, staged, buffer;            // floats of a panel, of its sums, and what packing needs
  int threads;

  explicit DirectGeometry(const Call& call)
      : rows(call, call.kernel_height(), call.top, phased(call)),
        columns(call, call.kernel_width(), call.left, phased(call)),
        filters(call) {
    lanes = Source<T>::lanes(call), groups = ceil_div(lanes, W), panels = ceil_div(filters.blocks, kPanelVectors);
    height = ceil_div(call.height(), rows.phases), width = ceil_div(call.width(), columns.phases);
    pixels = (width + (columns.high - columns.low) / columns.step) | 1, row = columns.step * pixels * W;
    most_taps = 1, all_taps = 0;
    for (int64_t p = 0; p < rows.phases; ++p) {
      for (int64_t q = 0; q < columns.phases; ++q) most_taps = most(most_taps, taps(p, q)), all_taps += taps(p, q);
    }
    packed = all_taps * lanes * kPanelColumns;
    buffer = vectors(offset_floats() + (Lane::kChannels * (chunk(call) * kernel(call) + most_taps)) * W);

    const int64_t span = rows.high - rows.low + 1;
    block = most(1, least(height, kPixels / most(1, width * columns.phases)));
    while (block > 1 && groups * (rows.step * (block - 1) + span) * row > kStripFloats) --block;
    blocks = ceil_div(height, block);
    slots = rows.step * (block - 1) + span, group = slots * row + W, image = groups * group;
    staged = kPanelVectors * block * columns.phases * width * W;
    threads = threads_of(call, most(call.batch() * blocks, panels));
  }

  int64_t taps(int64_t p, int64_t q) const { return static_cast<int64_t>(rows.count[p]) * columns.count[q]; }
  static int64_t kernel(const Call& call) { return call.kernel_height() * call.kernel_width(); }
  static int64_t chunk(const Call& call) { return most(1, kChunkTaps / kernel(call)); }  // lanes packed at a time
  int64_t offset_floats() const { return vectors(2 * most_taps); }
  int64_t weight_floats() const { return vectors(panels * packed); }
  int64_t thread_floats() const { return vectors(image) + vectors(staged) + vectors(row) + buffer; }
  int64_t floats() const { return weight_floats() + threads * thread_floats(); }

 private:
  static constexpr int64_t kPixels = 256;           // of outputs in an item, so that a panel's filters are used often
  static constexpr int64_t kStripFloats = 1 << 17;  // half of L2
  static constexpr int64_t kChunkTaps = 256;
};

template <class T>
class Direct {
 public:
  using Geometry = DirectGeometry<T>;
  using Lane = LaneOf<T>;

  Direct(const Call& call, const Geometry& g, float* space)
      : call_(phased(call) ? of_stored(call) : call),
        g_(g),
        source_(call_, !phased(call)),
        finish_(call_),
        weights_(call_),
        filters_(space),
        scratch_(space + g.weight_floats()) {}
  Direct(const Direct&) = delete;
  Direct& operator=(const Direct&) = delete;

  void run() {
    int packing = 0, working = 0;
    parallel_for(g_.panels, 1, g_.threads, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(packing);
      for (int64_t panel = begin; panel < end; ++panel) pack(panel, scratch, filters_ + panel * g_.packed);
    });
    parallel_for(call_.batch() * g_.blocks, 1, g_.threads, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(working);
      Held held;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / g_.blocks, first = i % g_.blocks * g_.block, rows = least(g_.block, g_.height - first);
        hold(b, first, rows, held, scratch.strips, scratch);
        for (int64_t panel = 0; panel < g_.panels; ++panel) {
          product(panel, filters_ + panel * g_.packed, b, first, rows, scratch.strips, scratch);
        }
      }
    });
  }

 private:
  struct Scratch {
    float *strips, *staged, *line, *buffer;
  };
  struct Held {  // rows [first, end) of image b are in the strips
    int64_t b = -1, first = 0, end = 0;
  };

  const Call call_;
  const Geometry& g_;
  Source<T> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  float *filters_, *scratch_;

  Scratch scratch_of(int& next) const {
    Scratch s{};
    s.strips = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
    s.staged = s.strips + vectors(g_.image), s.line = s.staged + vectors(g_.staged);
    s.buffer = s.line + vectors(g_.row);
    return s;
  }

  // ---- filters: → [phase][tap][lane of inputs][panel's columns]

  void pack(int64_t panel, const Scratch& scratch, float* to) const {
    const int64_t kernel = Geometry::kernel(call_), chunk = Geometry::chunk(call_) * Lane::kChannels;
    float* sums = scratch.buffer + g_.offset_floats();  // of one lane: [channel of it][tap][output]
    float* taps = sums + Lane::kChannels * g_.most_taps * W;
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      for (int64_t c = 0; c < call_.inputs(); c += chunk) {
        const int64_t some = least(chunk, call_.inputs() - c);
        weights_.read(panel * kPanelVectors + v, c, some, taps);
        for (int64_t k = 0; k < some; k += Lane::kChannels) {
          const int64_t present = least(Lane::kChannels, some - k), lane = (c + k) / Lane::kChannels;
          float* phase = to + lane * kPanelColumns + v * W;
          for (int64_t p = 0; p < g_.rows.phases; ++p) {
            for (int64_t q = 0; q < g_.columns.phases; ++q) {
              pack_phase(p, q, present, taps + k * kernel * W, sums, phase);
              phase += g_.taps(p, q) * g_.lanes * kPanelColumns;
            }
          }
        }
      }
    }
  }

  void pack_phase(int64_t p, int64_t q, int64_t present, const float* taps, float* sums, float* to) const {
    const int64_t kernel = Geometry::kernel(call_), wide = call_.kernel_width(), count = g_.taps(p, q);
    memset(sums, 0, static_cast<size_t>(Lane::kChannels * count * W) * sizeof(float));
    for (int64_t c = 0; c < present; ++c) {
      for (int64_t i = 0; i < kernel; ++i) {
        const int row = g_.rows.tap[p][i / wide], column = g_.columns.tap[q][i % wide];
        if (row < 0 || column < 0) continue;
        float* sum = sums + (c * count + row * g_.columns.count[q] + column) * W;
        store(sum, load(sum) + load(taps + (c * kernel + i) * W));
      }
    }
    const float* second = sums + (Lane::kChannels - 1) * count * W;
    for (int64_t t = 0; t < count; ++t) {
      store(to + t * g_.lanes * kPanelColumns, Lane::pack(load(sums + t * W), load(second + t * W)));
    }
  }

  // ---- strips

  int64_t slot(int64_t y) const { return (y - g_.rows.low) % g_.slots; }

  // Reads what rows [first, first + rows) of each phase need and the strips lack.
  void hold(int64_t b, int64_t first, int64_t rows, Held& held, float* strips, const Scratch& scratch) const {
    const int64_t begin = g_.rows.step * first + g_.rows.low;
    const int64_t end = g_.rows.step * (first + rows - 1) + g_.rows.high + 1;
    if (held.b != b || begin < held.first || begin > held.end) held = {b, begin, begin};
    const int64_t step = g_.columns.step, low = g_.columns.low;
    const int64_t count = step * (g_.width - 1) + g_.columns.high - low + 1;
    for (int64_t y = held.end; y < end; ++y) {
      for (int64_t group = 0; group < g_.groups; ++group) {
        float* row = strips + group * g_.group + slot(y) * g_.row;
        source_.read(b, group, y, low, count, step == 1 ? row : scratch.line);
        for (int64_t i = 0; step > 1 && i < count; ++i) {
          store(row + (i % step * g_.pixels + i / step) * W, load(scratch.line + i * W));
        }
      }
    }
    held.first = begin, held.end = end;
  }

  // ---- products

  // Where the taps of a phase begin for row y of its outputs, relative to the strips.
  void place(int64_t p, int64_t q, int64_t y, int64_t* offsets) const {
    for (int r = 0; r < g_.rows.count[p]; ++r) {
      const int64_t row = slot(g_.rows.step * y + g_.rows.at[p][r]) * g_.row;
      for (int c = 0; c < g_.columns.count[q]; ++c) {
        const int64_t column = g_.columns.at[q][c] - g_.columns.low, step = g_.columns.step;
        *offsets++ = row + (column % step * g_.pixels + column / step) * W;
      }
    }
  }

  void product(int64_t panel, const float* filters, int64_t b, int64_t first, int64_t rows, const float* strips,
               const Scratch& scratch) const {
    const int64_t P = g_.columns.phases, line = P * g_.width * W, block = g_.block * line;
    const Blocks shape = {nullptr, g_.group, static_cast<int>(g_.groups), 1,
                          static_cast<int>(g_.lanes - (g_.groups - 1) * W)};
    int64_t* offsets = reinterpret_cast<int64_t*>(scratch.buffer);
    for (int64_t p = 0; p < g_.rows.phases; ++p) {
      const int64_t some = least(rows, ceil_div(call_.height() - p, g_.rows.phases) - first);
      for (int64_t q = 0; q < P; ++q) {
        const int64_t taps = g_.taps(p, q), width = ceil_div(call_.width() - q, P);
        for (int64_t y = 0; y < some; ++y) {
          place(p, q, first + y, offsets);
          float* to = scratch.staged + y * line + q * W;
          for (int64_t x = 0; x < width;) {
            const int height = tile_height(width - x);
            with_height(height, [&](auto h) {
              sum_of_products<Lane, decltype(h)::value>(
                  shape, taps,
                  [&](int64_t t) {
                    return Factors{strips + x * W + offsets[t], filters + t * g_.lanes * kPanelColumns};
                  },
                  [&](int r, int v, Vec sums) { store(to + v * block + (x + r) * P * W, sums); });
            });
            x += height;
          }
        }
        filters += taps * g_.lanes * kPanelColumns;
      }
      const int64_t step = g_.filters.gated ? 2 : 1;
      for (int64_t v = 0; v < kPanelVectors && panel * kPanelVectors + v < g_.filters.blocks; v += step) {
        const int64_t unit = g_.filters.unit(panel * kPanelVectors + v);
        for (int64_t y = 0; y < some; ++y) {
          float* sums = scratch.staged + v * block + y * line;
          finish_(b, unit, g_.rows.phases * (first + y) + p, 0, call_.width(), sums, sums + block);
        }
      }
    }
  }
};

}  // namespace

void direct(const Call& call, irt_status& status) { run_for_dtype<Direct>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
