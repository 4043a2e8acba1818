// The convolution that all convolution ops share, as an implicit GEMM: output pixels × outputs, summed over taps ×
// channels. Options of padding, stride, dilation, upsampling and transposition are index arithmetic (plan/conv2d.h).
//
// A first kernel packs the weights: in the order of the sum, a slab of a tile in one piece, as it lies in shared
// memory; sums of taps formed (doubled input), rounded to TF32, gates behind their features, 0 where a row, a tap or a
// pack does not exist. Then a block walks over the slabs in two halves of shared memory. Packed weights are copied
// there asynchronously. The input passes through registers, where masks, borders and layouts are dealt with: packs of
// 16 bytes where channels are neighbours, else element by element, neighbouring threads at neighbouring pixels. At the
// end, sums go through shared memory to the order in which the output lies, and are finished (`Finish`: norm, bias,
// activation, gate, residual) and written there.
//
// Along the inner dimension a slab's words may be taken in any order, if it is one for both operands. Thread t of the
// four that share rows takes pack t, so that all its words of a row come with one load of 16 bytes, for tensor cores
// (mma.cuh) and fused multiply-adds alike. IEEE sums keep those of 4 slabs, 64 terms, apart from the rest: one chain of
// thousands of terms would err by more than the definition does.
//
// Offsets are 64-bit: they are formed once for a pack, 8 to 32 of whose products are waited for.
//
// Considered:
// - cp.async for the input too: it can neither mask nor round to TF32; the rounding of each use costs four times that
//   of each store. Measure first.
// - The sum in parts for small maps: see kernels/_conv2d.py.
#pragma once

#include "activation.cuh"
#include "mma.cuh"
#include "plan/conv2d.h"

namespace irt {

__device__ __forceinline__ unsigned char* conv2d_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

namespace conv2d {

constexpr int kPixels = Conv2d::kPixels, kPacks = Conv2d::kPacks;

struct alignas(16) Words {
  unsigned values[4];
};

// What a block computes: neighbours share pixels, then phases of them.
__device__ __forceinline__ Conv2d::Common common_of(const Conv2d& p, int block) {
  Conv2d::Common common = {};
  common.tile = block % p.tiles;
  block /= p.tiles;
  const int phase = block % (p.period * p.period);
  common.phase_y = phase / p.period;
  common.phase_x = phase % p.period;
  block /= p.period * p.period;
  common.group = block % p.groups;
  common.first_pixel = block / p.groups * kPixels;
  common.y = p.taps(0, common.phase_y);
  common.x = p.taps(1, common.phase_x);
  return common;
}

// ---- products ------------------------------------------------------------------------------------------------------

// How the warps of a block share its tile, and the threads of a warp theirs: kStage rows at a time, kSteps times.
template <int kOutputs>
struct Shares {
  static constexpr int kAcross = Conv2d::warps_across(kOutputs), kColumns = kOutputs / kAcross;
  static constexpr int kStage = Conv2d::stage_rows(kOutputs), kSteps = kPixels / kStage;
  int row, column, g, t;  // the warp's first; lane 4 · g + t

  __device__ __forceinline__ explicit Shares(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    row = warp / kAcross * 16;
    column = warp % kAcross * kColumns;
    g = lane / 4;
    t = lane % 4;
  }
};

// On tensor cores. A thread holds rows g and g + 8 and columns 2 · t, 2 · t + 1 of each 16 × 8.
template <class T, Products kProducts, int kOutputs>
struct Product {
  using Lanes = Shares<kOutputs>;
  static constexpr int kGroups = Lanes::kColumns / 8;
  Lanes lanes;
  float sum[Lanes::kSteps][kGroups][4];

  __device__ __forceinline__ explicit Product(int thread) : lanes(thread) {
    IRT_UNROLL
    for (int i = 0; i < Lanes::kSteps; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kGroups; ++j) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0.0f;
    }
  }
  __device__ __forceinline__ void add(const unsigned char* pixels, const unsigned char* filters, int) {
    Words b[kGroups];
    IRT_UNROLL
    for (int j = 0; j < kGroups; ++j) b[j] = words(filters, lanes.column + 8 * j + lanes.g);
    IRT_UNROLL
    for (int i = 0; i < Lanes::kSteps; ++i) {
      const int row = i * Lanes::kStage + lanes.row + lanes.g;
      const Words low = words(pixels, row), high = words(pixels, row + 8);
      IRT_UNROLL
      for (int k = 0; k < 4; k += 2) {
        const unsigned a[4] = {low.values[k], high.values[k], low.values[k + 1], high.values[k + 1]};
        IRT_UNROLL
        for (int j = 0; j < kGroups; ++j) {
          const unsigned two[2] = {b[j].values[k], b[j].values[k + 1]};
          multiply_add(sum[i][j], a, two, T());
        }
      }
    }
  }
  __device__ __forceinline__ void end() {}
  // Rows `step` · kStage and on.
  __device__ __forceinline__ void put(int step, float* stage) const {
    IRT_UNROLL
    for (int i = 0; i < Lanes::kSteps; ++i) {
      if (i != step) continue;
      IRT_UNROLL
      for (int j = 0; j < kGroups; ++j) {
        float* const to = stage + (lanes.row + lanes.g) * (kOutputs + 1) + lanes.column + 8 * j + 2 * lanes.t;
        to[0] = sum[i][j][0];
        to[1] = sum[i][j][1];
        to[8 * (kOutputs + 1)] = sum[i][j][2];
        to[8 * (kOutputs + 1) + 1] = sum[i][j][3];
      }
    }
  }

 private:
  __device__ __forceinline__ Words words(const unsigned char* rows, int row) const {
    return *reinterpret_cast<const Words*>(rows + Conv2d::place(row, lanes.t));
  }
};

// By fused multiply-adds. A thread holds rows g and g + 8 of each 16 and every fourth column from t on.
template <class T, int kOutputs>
struct Product<T, Products::ieee, kOutputs> {
  using Lanes = Shares<kOutputs>;
  static constexpr int kRows = 2 * Lanes::kSteps, kColumns = Lanes::kColumns / 4, kApart = 4;
  Lanes lanes;
  float sum[kRows][kColumns], part[kRows][kColumns];

  __device__ __forceinline__ explicit Product(int thread) : lanes(thread) {
    IRT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] = part[i][j] = 0.0f;
    }
  }
  __device__ __forceinline__ void add(const unsigned char* pixels, const unsigned char* filters, int slab) {
    IRT_ROLL
    for (int k = 0; k < 2 * kPacks; ++k) {
      Pack<float, 2> b[kColumns];
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) b[j] = two(filters, lanes.column + 4 * j + lanes.t, k);
      IRT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = i / 2 * Lanes::kStage + lanes.row + i % 2 * 8 + lanes.g;
        const Pack<float, 2> a = two(pixels, row, k);
        IRT_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          IRT_UNROLL
          for (int v = 0; v < 2; ++v) part[i][j] += a.values[v] * b[j].values[v];
        }
      }
    }
    if (slab % kApart == kApart - 1) end();
  }
  __device__ __forceinline__ void end() {
    IRT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        sum[i][j] += part[i][j];
        part[i][j] = 0.0f;
      }
    }
  }
  __device__ __forceinline__ void put(int step, float* stage) const {
    IRT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i / 2 != step) continue;
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        stage[(lanes.row + i % 2 * 8 + lanes.g) * (kOutputs + 1) + lanes.column + 4 * j + lanes.t] = sum[i][j];
      }
    }
  }

 private:
  // Half a pack: whole ones would hold more registers than there are.
  static __device__ __forceinline__ Pack<float, 2> two(const unsigned char* rows, int row, int k) {
    return *reinterpret_cast<const Pack<float, 2>*>(rows + Conv2d::place(row, k / 2) + k % 2 * 8);
  }
};

// ---- the input -----------------------------------------------------------------------------------------------------

// Where to read coordinate i of an axis; false: nowhere, there is 0.
__device__ __forceinline__ bool border(const Conv2d& p, int axis, int& i) {
  const int size = p.size[axis];
  if (p.border == Conv2d::kZeros) {
    if (i < 0 || i >= size) return false;
  } else if (p.border == Conv2d::kReplicate) {
    i = i < 0 ? 0 : i >= size ? size - 1 : i;
  } else {
    i = i < 0 ? -i : i;
    i = i < size ? i : 2 * (size - 1) - i;
  }
  if (p.halved) i >>= 1;
  return true;
}

// A thread's share of the input of a slab: kShare packs, of pixels that stay the same.
template <class T, Products kProducts, int kThreads>
struct Input {
  static constexpr int kPerPack = Conv2d::kPackBytes / static_cast<int>(sizeof(T));
  static constexpr int kShare = kPixels * kPacks / kThreads;
  using Held = Pack<T, kPerPack>;

  Held held[kShare];
  float factor[kShare];  // of a mask of one plane

  // Packs of one pixel belong to neighbouring threads where they are neighbours in memory; else those of one channel.
  static __device__ __forceinline__ void locate(const Conv2d& p, int thread, int i, int& pixel, int& pack) {
    pixel = p.inner ? thread / kPacks + i * (kThreads / kPacks) : thread % kPixels;
    pack = p.inner ? thread % kPacks : thread / kPixels + i * (kThreads / kPixels);
  }

  template <class Operands>
  __device__ __forceinline__ void fetch(const Conv2d& p, const Operands& operands, const Conv2d::Pixel* pixels,
                                        const Conv2d::Common& common, int thread, int slab) {
    IRT_UNROLL
    for (int i = 0; i < kShare; ++i) {
      IRT_UNROLL
      for (int v = 0; v < kPerPack; ++v) from_float(0.0f, held[i].values[v]);
      factor[i] = 1.0f;
      int pixel, pack;
      locate(p, thread, i, pixel, pack);
      pack += slab * kPacks;
      const int tap = p.packs.quotient(pack), tap_y = tap / common.x.count;
      const Conv2d::Pixel at = pixels[pixel];
      if (at.sample < 0 || tap_y >= common.y.count) continue;
      int row = at.row + tap_y * common.y.move;
      int column = at.column + (tap - tap_y * common.x.count) * common.x.move;
      if (!border(p, 0, row) || !border(p, 1, column)) continue;
      const Conv2d::Channels channels = p.pack_channels(common.group, pack - tap * p.packs.value, kPerPack);
      if (channels.left <= 0) continue;
      const Conv2d::Tensor& part = p.parts[channels.part];
      const T* data = static_cast<const T*>(operands.part(channels.part)) + at.sample * part.strides[0] +
                      row * part.strides[2] + column * part.strides[3] + channels.channel * part.strides[1];
      if (p.vectors[channels.part] && channels.left >= kPerPack) {
        held[i] = load_pack<kPerPack>(data);
      } else {
        IRT_UNROLL
        for (int v = 0; v < kPerPack; ++v, data += part.strides[1]) {
          if (v < channels.left) held[i].values[v] = *data;
        }
      }
      operands.adjust(held[i], at.sample, channels.channel, channels.left);
      if (!p.mask.data) continue;
      data = static_cast<const T*>(p.mask.data) + at.sample * p.mask.strides[0] + row * p.mask.strides[2] +
             column * p.mask.strides[3];
      if (!p.mask_planes) {
        factor[i] = to_float(*data);
        continue;
      }
      data += (channels.channel + channels.part * p.first_channels) * p.mask.strides[1];
      IRT_UNROLL
      for (int v = 0; v < kPerPack; ++v, data += p.mask.strides[1]) {
        if (v < channels.left) scale(held[i].values[v], to_float(*data));
      }
    }
  }

  __device__ __forceinline__ void stash(const Conv2d& p, int thread, unsigned char* rows) {
    IRT_UNROLL
    for (int i = 0; i < kShare; ++i) {
      if (p.mask.data && !p.mask_planes) {
        IRT_UNROLL
        for (int v = 0; v < kPerPack; ++v) scale(held[i].values[v], factor[i]);
      }
      if constexpr (kProducts == Products::tf32) {
        IRT_UNROLL
        for (int v = 0; v < kPerPack; ++v) held[i].values[v] = to_tf32(held[i].values[v]);
      }
      int pixel, pack;
      locate(p, thread, i, pixel, pack);
      *reinterpret_cast<Held*>(rows + Conv2d::place(pixel, pack)) = held[i];
    }
  }

 private:
  static __device__ __forceinline__ void scale(T& value, float factor) { from_float(to_float(value) * factor, value); }
};

// ---- the convolution -----------------------------------------------------------------------------------------------

// Reads and writes what the parameters point to, as it is.
struct Given {
  const Conv2d& p;

  __device__ __forceinline__ const void* part(int i) const { return p.parts[i].data; }
  __device__ __forceinline__ void* out() const { return p.out; }
  template <class Held>
  __device__ __forceinline__ void adjust(Held&, int, int, int) const {}
};

// finish(sums, at, output): what becomes of the sum sums[0] (and of the gate's, sums[half a tile]) at output pixel
// `at`, `output` being counted over all groups. `operands` are as `Given`: where parts and output lie, and what is done
// to a pack of channels (of a sample, from a channel of its part on, so many) before it is multiplied.
template <class T, Products kProducts, int kOutputs, class Finish, class Operands>
__device__ __forceinline__ void run(const Conv2d& p, const void* workspace, const Finish& finish,
                                    const Operands& operands) {
  using Share = Shares<kOutputs>;
  constexpr int kFilterBytes = kOutputs * Conv2d::kRowBytes, kPixelBytes = kPixels * Conv2d::kRowBytes;
  constexpr int kThreads = Conv2d::threads(kOutputs);
  const int thread = static_cast<int>(threadIdx.x);
  Conv2d::Pixel* const pixels = reinterpret_cast<Conv2d::Pixel*>(conv2d_memory());
  Conv2d::Common& common = *reinterpret_cast<Conv2d::Common*>(pixels + kPixels);
  unsigned char* const slabs = reinterpret_cast<unsigned char*>(&common + 1);  // two of pixels, two of filters
  if (thread == 0) common = common_of(p, static_cast<int>(blockIdx.x));
  __syncthreads();

  // The pixels: what their first tap reads, or, at the end, which outputs they are.
  const auto place_pixels = [&](bool outputs) {
    if (thread >= kPixels) return;
    const int index = common.first_pixel + thread, row = p.columns.quotient(index), sample = p.rows.quotient(row);
    const int u = row - sample * p.rows.value, v = index - row * p.columns.value;
    const int y = u * p.period + common.phase_y, x = v * p.period + common.phase_x;
    const int pace = p.form == Conv2d::kPlain ? p.stride : 1;
    const bool exists = index < p.pixels && y < p.out_size[0] && x < p.out_size[1];
    pixels[thread] = {exists ? sample : -1, outputs ? y : u * pace + common.y.origin,
                      outputs ? x : v * pace + common.x.origin, 0};
  };
  place_pixels(false);
  __syncthreads();

  const int packs = common.y.count * common.x.count * p.packs.value, last = (packs + kPacks - 1) / kPacks;
  const long long piece =
      ((static_cast<long long>(common.phase_y) * p.period + common.phase_x) * p.groups + common.group) * p.tiles +
      common.tile;
  const unsigned char* const filters = static_cast<const unsigned char*>(workspace) + piece * p.slabs * kFilterBytes;
  const auto copy_filters = [&](int slab) {
    unsigned char* const to = slabs + 2 * kPixelBytes + slab % 2 * kFilterBytes;
    IRT_UNROLL
    for (int at = 0; at < kFilterBytes; at += kThreads * Conv2d::kPackBytes) {
      const int mine = at + thread * Conv2d::kPackBytes;
      if (mine < kFilterBytes) copy_later(to + mine, filters + static_cast<long long>(slab) * kFilterBytes + mine);
    }
  };
  Product<T, kProducts, kOutputs> product(thread);
  if (last > 0) {
    Input<T, kProducts, kThreads> input;
    copy_filters(0);
    input.fetch(p, operands, pixels, common, thread, 0);
    input.stash(p, thread, slabs);
    copies_done();
    __syncthreads();
    IRT_ROLL
    for (int slab = 0; slab < last; ++slab) {
      const bool more = slab + 1 < last;
      if (more) {
        copy_filters(slab + 1);
        input.fetch(p, operands, pixels, common, thread, slab + 1);
      }
      product.add(slabs + slab % 2 * kPixelBytes, slabs + 2 * kPixelBytes + slab % 2 * kFilterBytes, slab);
      if (more) input.stash(p, thread, slabs + (slab + 1) % 2 * kPixelBytes);
      copies_done();
      __syncthreads();
    }
  }
  product.end();

  place_pixels(true);
  float* const stage = reinterpret_cast<float*>(slabs);
  const int each = kOutputs / p.halves, first_output = common.tile * each;
  T* const out = static_cast<T*>(operands.out());
  IRT_ROLL
  for (int step = 0; step < Share::kSteps; ++step) {
    product.put(step, stage);
    __syncthreads();
    IRT_ROLL
    for (int i = thread; i < Share::kStage * each; i += kThreads) {
      const int row = p.out_inner ? i / each : i % Share::kStage, column = p.out_inner ? i % each : i / Share::kStage;
      const Conv2d::Pixel at = pixels[step * Share::kStage + row];
      if (at.sample < 0 || first_output + column >= p.outputs) continue;
      const int output = common.group * p.outputs + first_output + column;
      const float value = finish(stage + row * (kOutputs + 1) + column, at, output);
      from_float(value, out[at.sample * p.out_strides[0] + output * p.out_strides[1] + at.row * p.out_strides[2] +
                            at.column * p.out_strides[3]]);
    }
    __syncthreads();
  }
}

template <class T, Products kProducts, int kOutputs, class Finish>
__device__ __forceinline__ void run(const Conv2d& p, const void* workspace, const Finish& finish) {
  run<T, kProducts, kOutputs>(p, workspace, finish, Given{p});
}

// ---- what finishes a sum -------------------------------------------------------------------------------------------

// An output's number of a vector.
template <class T>
__device__ __forceinline__ float element(const Conv2d::Vector& vector, int output) {
  return to_float(static_cast<const T*>(vector.data)[output * vector.stride]);
}

template <class T>
__device__ __forceinline__ float activated(int act, float x, float alpha) {
  switch (static_cast<Act>(act)) {
    case Act::none: break;
    case Act::relu: return activate<T, Act::relu>(x, alpha);
    case Act::leaky_relu: return activate<T, Act::leaky_relu>(x, alpha);
    case Act::elu: return activate<T, Act::elu>(x, alpha);
    case Act::silu: return activate<T, Act::silu>(x, alpha);
    case Act::sigmoid: return activate<T, Act::sigmoid>(x, alpha);
    case Act::tanh: return activate<T, Act::tanh>(x, alpha);
  }
  return x;
}

// What ends a styled layer: NaN passes the bound.
template <class T>
__device__ __forceinline__ float styled(int act, float x, float alpha, float gain, float bound) {
  x = activated<T>(act, x, alpha) * gain;
  return x < -bound ? -bound : x > bound ? bound : x;
}

}  // namespace conv2d

// ---- the weights ---------------------------------------------------------------------------------------------------

// A block packs a slab of a tile.
template <class T>
__global__ void __launch_bounds__(Conv2d::kPackThreads) conv2d_pack(const __grid_constant__ Conv2d p, void* workspace) {
  constexpr int kPerPack = Conv2d::kPackBytes / static_cast<int>(sizeof(T));
  int index = static_cast<int>(blockIdx.x);
  unsigned char* const rows =
      static_cast<unsigned char*>(workspace) + static_cast<long long>(index) * p.width * Conv2d::kRowBytes;
  const int slab = index % p.slabs;
  index /= p.slabs;
  const int tile = index % p.tiles;
  index /= p.tiles;
  const int group = index % p.groups, phase = index / p.groups;
  const Conv2d::Taps along_y = p.taps(0, phase / p.period), along_x = p.taps(1, phase % p.period);
  const bool doubled = p.form == Conv2d::kDoubled;

  IRT_ROLL
  for (int i = static_cast<int>(threadIdx.x); i < p.width * Conv2d::kPacks; i += Conv2d::kPackThreads) {
    const int row = i / Conv2d::kPacks, filter = p.filter(tile, row);
    const int pack = slab * Conv2d::kPacks + i % Conv2d::kPacks, tap = p.packs.quotient(pack);
    const int tap_y = along_x.count ? tap / along_x.count : 0, tap_x = tap - tap_y * along_x.count;
    const Conv2d::Channels channels = p.pack_channels(group, pack - tap * p.packs.value, kPerPack);
    const int first = channels.channel + channels.part * p.first_channels - group * p.channels;  // in the group
    int y = along_y.first + tap_y * along_y.step, x = along_x.first + tap_x * along_x.step, most = 1;
    if (doubled) {
      y = 2 * tap_y - ((phase / p.period - p.before[0]) & 1);
      x = 2 * tap_x - ((phase % p.period - p.before[1]) & 1);
      most = 2;
    }
    const bool exists = filter >= 0 && tap_y < along_y.count && along_x.count;
    Pack<T, kPerPack> result;
    IRT_UNROLL
    for (int v = 0; v < kPerPack; ++v) {
      float sum = 0.0f;
      if (exists && v < channels.left) {
        const T* const weight = static_cast<const T*>(p.weight.data) + group * p.weight_group +
                                filter * p.weight.strides[0] + (first + v) * p.weight.strides[1];
        for (int dy = 0; dy < most; ++dy) {
          for (int dx = 0; dx < most; ++dx) {
            const bool is = y + dy >= 0 && y + dy < p.kernel[0] && x + dx >= 0 && x + dx < p.kernel[1];
            if (is) sum += to_float(weight[(y + dy) * p.weight.strides[2] + (x + dx) * p.weight.strides[3]]);
          }
        }
      }
      if (p.rounded) sum = to_tf32(sum);
      from_float(sum, result.values[v]);
    }
    *reinterpret_cast<Pack<T, kPerPack>*>(rows + Conv2d::place(row, i % Conv2d::kPacks)) = result;
  }
}

}  // namespace irt
