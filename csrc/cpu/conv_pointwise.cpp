// 1×1 convolutions of stride 1 as one product: some pixels of the image at a time, read into the blocked layout and
// multiplied by the packed weight. Sums and what follows are float; bf16 data are multiplied as they are where the CPU
// does that (lanes.h), else as floats.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

constexpr int64_t kPixelsPerBlock = 8 * kTileRows;  // whole tiles of the product, whole squares of a transposition

// A call whose images are one row of pixels each, if they lie so in memory: nothing here depends on their shape.
struct Flat {
  irt_view x[kMostParts], out, residual;
  Call call;

  explicit Flat(const Call& given) : out(*given.out), call(given) {
    residual = given.residual ? *given.residual : out;
    bool flat = flatten(out) && flatten(residual) && !given.mask && given.upsample == 1 &&
                !(given.style && given.style->filter);
    for (int i = 0; i < given.parts; ++i) flat = flatten(x[i] = given.x[i]) && flat;
    if (!flat) return;
    call.x = x, call.out = &out, call.residual = given.residual ? &residual : nullptr;
  }
  Flat(const Flat&) = delete;
  Flat& operator=(const Flat&) = delete;

 private:
  static bool flatten(irt_view& view) {
    const int64_t height = view.sizes[2], width = view.sizes[3];
    if (width == 1) {
      view.strides[3] = view.strides[2];
    } else if (height > 1 && view.strides[2] != width * view.strides[3]) {
      return false;
    }
    view.sizes[2] = 1, view.sizes[3] = height * width;
    return true;
  }
};

template <class T>
struct PointwiseGeometry {
  using Lane = LaneOf<T>;
  Filters filters;
  int64_t lanes, in_blocks, panels;  // of inputs; vectors of those; panels of filters
  int64_t count, blocks;             // pixels in a block, blocks in a row
  int64_t pixels;                    // distance of groups, odd, so that groups do not share cache sets
  bool last;                         // the channels of an output's pixel lie together: no block of sums is kept
  int threads;

  explicit PointwiseGeometry(const Call& call) : filters(call) {
    lanes = Source<T>::lanes(call), in_blocks = ceil_div(lanes, W), panels = ceil_div(filters.blocks, kPanelVectors);
    count = least(kPixelsPerBlock, call.width()), blocks = ceil_div(call.width(), count);
    pixels = count | 1, last = call.out->strides[1] == 1;
    threads = threads_of(call, call.batch() * call.height() * blocks);
  }
  int64_t weight_floats() const { return vectors(panels * lanes * kPanelColumns); }
  int64_t thread_floats() const { return vectors((in_blocks + (last ? 0 : filters.blocks)) * pixels * W); }
  int64_t floats() const { return weight_floats() + threads * thread_floats(); }
};

template <class T>
class Pointwise {
 public:
  using Lane = LaneOf<T>;
  using Geometry = PointwiseGeometry<T>;

  Pointwise(const Call& call, const Geometry& g, float* space)
      : call_(call),
        g_(g),
        source_(call, true),
        finish_(call),
        weights_(call),
        filters_(space),
        scratch_(space + g.weight_floats()) {}

  void run() {
    parallel_for(g_.panels * kPanelVectors, 1, g_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const int64_t place = o / kPanelVectors * g_.lanes * kPanelVectors + o % kPanelVectors;
        pack_pointwise(weights_, o, call_.inputs(), filters_ + place * W);
      }
    });
    int next = 0;
    const int64_t rows = call_.batch() * call_.height();
    parallel_for(rows * g_.blocks, 1, g_.threads, [&](int64_t begin, int64_t end) {
      float* inputs = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / g_.blocks;
        block(row / call_.height(), row % call_.height(), i % g_.blocks * g_.count, inputs);
      }
    });
  }

 private:
  const Call& call_;
  const Geometry& g_;
  Source<T> source_;
  Finish<T> finish_;
  Weights<T> weights_;
  float *filters_, *scratch_;  // filters: [panel][lane of inputs][panel's columns]

  void block(int64_t b, int64_t y, int64_t first, float* inputs) const {
    const int64_t count = least(g_.count, call_.width() - first), distance = g_.pixels * W;
    float* outputs = inputs + g_.in_blocks * distance;
    for (int64_t c = 0; c < g_.in_blocks; ++c) source_.read(b, c, y, first, count, inputs + c * distance);
    const Blocks a = {inputs, distance, static_cast<int>(g_.in_blocks), 1, Source<T>::tail(call_)};
    const int64_t unit = call_.gated ? 2 : 1;
    const auto finish = [&](int64_t o, int64_t pixel, int64_t some, float* sums, int64_t next) {
      finish_(b, g_.filters.unit(o), y, first + pixel, some, sums, sums + next);
    };
    if (!g_.last) {
      gemm<Lane>(a, count, filters_, static_cast<int>(g_.panels), [&](int panel, int64_t pixel, int v, Vec sums) {
        const int64_t o = static_cast<int64_t>(panel) * kPanelVectors + v;
        if (o < g_.filters.blocks) store(outputs + o * distance + pixel * W, sums);
      });
      for (int64_t o = 0; o < g_.filters.blocks; o += unit) finish(o, 0, count, outputs + o * distance, distance);
      return;
    }
    // Channels of a pixel that lie together leave with their tile, and the stores are done under the next one's
    // products.
    alignas(64) float tile[kPanelVectors][kTileRows * W];
    for (int64_t pixel = 0, height; pixel < count; pixel += height) {
      height = tile_height(count - pixel);
      const Blocks rows = {inputs + pixel * W, a.stride, a.groups, a.tails, a.tail};
      for (int64_t panel = 0, o = 0; panel < g_.panels; ++panel) {
        gemm<Lane>(rows, height, filters_ + panel * panel_floats(a), 1,
                   [&](int, int64_t row, int v, Vec sums) { store(tile[v] + row * W, sums); });
        for (int64_t v = 0; v < kPanelVectors && o < g_.filters.blocks; v += unit, o += unit) {
          finish(o, pixel, height, tile[v], kTileRows * W);
        }
      }
    }
  }
};

}  // namespace

void pointwise(const Call& call, irt_status& status) { run_for_dtype<Pointwise>(Flat(call).call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
