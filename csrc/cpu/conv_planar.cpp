// Convolutions with very few filters, such as the layer that makes the picture: pixels are the lanes.
//
// Elsewhere in the engine outputs are the lanes of a vector, of which three would leave most of it empty. Here a row of
// the image is turned into one row of pixels per channel, and a tile holds the sums of all filters for a few vectors of
// neighbouring pixels over all channels and taps: F broadcasts of weights and some loads of pixels, at any offset, for
// F times as many multiply-adds. Most of those loads cross cache lines and count twice, so each is made once: weights
// stay in registers and pixels pass by.
#include "conv_algorithms.h"
#include "conv_finish.h"
#include "conv_source.h"
#include "conv_weights.h"
#include "gemm.h"
#include "parallel.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

constexpr int kRegisters = Vec::kWidth == 16 ? 32 : 16;
constexpr int kMostVectors = 8;

// Vectors of pixels in a tile: their sums, the weights and one of them are in registers.
constexpr int vectors_of(int filters) {
  const int vectors = (kRegisters - 1 - filters) / filters;
  return vectors > kMostVectors ? kMostVectors : vectors;
}

// Keeps what was loaded in a register. Compilers rather load it again for each use, for a register less.
IRT_INLINE void keep(Vec& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x.v));
#elif defined(__AVX2__)
  asm("" : "+x"(x.v));
#else
  (void)x;
#endif
}

struct PlanarGeometry {
  int64_t filters, taps;
  int64_t channels, groups;  // of inputs; vectors of them
  int64_t slots, pixels;     // of strips: rows, pixels of a row (whole vectors, so that tiles need no tails)
  int64_t channel, row;      // floats of a channel's strips; of a row of sums
  int threads;

  explicit PlanarGeometry(const Call& call) {
    filters = call.outputs() * (call.gated ? 2 : 1), taps = call.kernel_height() * call.kernel_width();
    channels = call.inputs(), groups = ceil_div(channels, W);
    slots = call.dilation * (call.kernel_height() - 1) + 1;
    const int64_t reach = call.dilation * (call.kernel_width() - 1);
    row = ceil_div(call.width(), W) * W;
    pixels = vectors(row + reach + kMostVectors * W);
    channel = slots * pixels + W;
    threads = threads_of(call, call.batch() * call.height());
  }
  int64_t weight_floats() const { return vectors(channels * taps * filters) + vectors(W * taps * W); }
  int64_t thread_floats() const {
    return vectors(groups * W * channel) + vectors(pixels * W) + vectors(kFewFilters * (row + kMostVectors * W)) +
           2 * vectors(row * W);
  }
  int64_t floats() const { return weight_floats() + threads * thread_floats(); }
};

template <class T>
class Planar {
 public:
  using Geometry = PlanarGeometry;

  Planar(const Call& call, const Geometry& g, float* space)
      : call_(call), g_(g), source_(call, true), finish_(call), weight_(space), scratch_(space + g.weight_floats()) {}

  void run() {
    pack();
    int next = 0;
    parallel_for(call_.batch() * call_.height(), 8, g_.threads, [&](int64_t begin, int64_t end) {
      float* strips = scratch_ + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * g_.thread_floats();
      float* line = strips + vectors(g_.groups * W * g_.channel);
      float* sums = line + vectors(g_.pixels * W);
      float* features = sums + vectors(kFewFilters * (g_.row + kMostVectors * W));
      int64_t image = -1, held = 0;  // the strips hold the rows of that image before `held`
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / call_.height(), y = i % call_.height(), first = y - call_.top;
        if (b != image) image = b, held = first;
        for (; held < first + g_.slots; ++held) hold(b, held, strips, line);
        multiply(first, strips, sums);
        finish(b, y, sums, features, features + vectors(g_.row * W));
      }
    });
  }

 private:
  const Call& call_;
  const Geometry& g_;
  Source<T, Single> source_;
  Finish<T> finish_;
  float *weight_, *scratch_;

  int64_t slot(int64_t y) const { return (y + call_.top) % g_.slots; }

  // → [channel][tap][filter]
  void pack() const {
    const Weights<T> weights(call_);
    const Filters blocks(call_);
    float* taps = weight_ + vectors(g_.channels * g_.taps * g_.filters);
    for (int64_t o = 0; o < blocks.blocks; ++o) {
      for (int64_t c = 0; c < g_.channels; ++c) {
        weights.read(o, c, 1, taps);
        for (int64_t t = 0; t < g_.taps; ++t) {
          float* to = weight_ + (c * g_.taps + t) * g_.filters + blocks.first(o);
          store_some(to, load(taps + t * W), blocks.count(o));
        }
      }
    }
  }

  // One row of the padded image, as rows of pixels.
  void hold(int64_t b, int64_t y, float* strips, float* line) const {
    for (int64_t group = 0; group < g_.groups; ++group) {
      source_.read(b, group, y, -call_.left, g_.pixels, line);
      float* to = strips + group * W * g_.channel + slot(y) * g_.pixels;
      const int64_t channels = least(W, g_.channels - group * W);
      for (int64_t x = 0; x < g_.pixels; x += W) {
        Vec square[W];
        for (int64_t i = 0; i < W; ++i) square[i] = load(line + (x + i) * W);
        transpose(square);
        for (int64_t c = 0; c < channels; ++c) store(to + c * g_.channel + x, square[c]);
      }
    }
  }

  void multiply(int64_t first, const float* strips, float* sums) const {
    switch (g_.filters) {
      case 1: return tiles<1>(first, strips, sums);
      case 2: return tiles<2>(first, strips, sums);
      case 3: return tiles<3>(first, strips, sums);
      case 4: return tiles<4>(first, strips, sums);
      case 5: return tiles<5>(first, strips, sums);
      default: return tiles<6>(first, strips, sums);
    }
  }

  template <int kFilters>
  void tiles(int64_t first, const float* strips, float* sums) const {
    constexpr int kVectors = vectors_of(kFilters);
    for (int64_t x = 0; x < g_.row; x += kVectors * W) tile<kFilters, kVectors>(first, strips + x, sums + x);
  }

  // The sums of one tile; chains are as long as elsewhere (kChain).
  template <int kFilters, int kVectors>
  void tile(int64_t first, const float* strips, float* to) const {
    const int64_t wide = call_.kernel_width(), d = call_.dilation;
    Vec sums[kFilters][kVectors], totals[kFilters][kVectors];
    const float* weight = weight_;
    int64_t length = 0;
    for (int64_t c = 0; c < g_.channels; ++c, strips += g_.channel) {
      for (int64_t i = 0; i < call_.kernel_height(); ++i) {
        const float* row = strips + slot(first + i * d) * g_.pixels;
#pragma GCC unroll 1
        for (int64_t j = 0; j < wide; ++j, weight += kFilters) {
          Vec values[kFilters];
#pragma GCC unroll 8
          for (int f = 0; f < kFilters; ++f) values[f] = Vec(weight[f]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            Vec pixels = load(row + j * d + v * W);
            keep(pixels);
#pragma GCC unroll 8
            for (int f = 0; f < kFilters; ++f) sums[f][v] = fma(values[f], pixels, sums[f][v]);
          }
        }
      }
      length += g_.taps;
      if (length < kChain && c + 1 < g_.channels) continue;
      length = 0;
#pragma GCC unroll 8
      for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) totals[f][v] = totals[f][v] + sums[f][v], sums[f][v] = Vec(0.0f);
      }
    }
    const int64_t distance = g_.row + kMostVectors * W;
#pragma GCC unroll 8
    for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(to + f * distance + v * W, totals[f][v]);
    }
  }

  void finish(int64_t b, int64_t y, const float* sums, float* features, float* gates) const {
    const int64_t outputs = call_.outputs(), distance = g_.row + kMostVectors * W;
    for (int64_t unit = 0; unit < ceil_div(outputs, W); ++unit) {
      const int64_t count = least(W, outputs - unit * W);
      turn(sums + unit * W * distance, count, features);
      if (call_.gated) turn(sums + (outputs + unit * W) * distance, count, gates);
      finish_(b, unit, y, 0, call_.width(), features, gates);
    }
  }

  // Rows of pixels → [pixel][lane]
  void turn(const float* from, int64_t count, float* to) const {
    const int64_t distance = g_.row + kMostVectors * W;
    for (int64_t x = 0; x < g_.row; x += W) {
      Vec square[W];
      for (int64_t c = 0; c < count; ++c) square[c] = load(from + c * distance + x);
      transpose(square);
      for (int64_t i = 0; i < W; ++i) store(to + (x + i) * W, square[i]);
    }
  }
};

}  // namespace

void planar(const Call& call, irt_status& status) { run_for_dtype<Planar>(call, status); }

}  // namespace irt::INPAINTRT_ISA::conv
