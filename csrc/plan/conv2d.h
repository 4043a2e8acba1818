// What the kernels of all convolution ops are given, and how the sum over taps and channels is laid out. Read by the
// planners (host C++) and the kernels (nvcc and NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// How products of a convolution are formed.
enum class Products {
  ieee,  // float by fused multiply-adds
  tf32,  // float on tensor cores, operands rounded to TF32's 10 bits
  half   // __half or __nv_bfloat16 on tensor cores, exact
};

// One block computes kPixels output pixels × a tile of outputs. It walks over the inner dimension in slabs of kPacks
// packs of 16 bytes: taps × packs of channels, so that channels are padded to a pack and not to a slab. Both operands
// of a slab lie in shared memory as rows of 64 bytes.
//
// Along each axis by itself, the outputs p = period · u + phase of one phase read
//
//   plain        input u · stride − before + tap · dilation
//   transposed   every `step`-th tap from `first` on; outputs of equal p mod stride share theirs
//   doubled      nearest-2x, then the convolution: the small input, through sums of the taps that read the same pixel
struct Conv2d {
  static constexpr int kPackThreads = 128;
  static constexpr int kResident = 512;  // threads of a processor, for which there are 128 registers each
  static constexpr int kPixels = 128;
  static constexpr int kPackBytes = 16, kPacks = 4, kRowBytes = kPackBytes * kPacks;

  enum Form { kPlain, kTransposed, kDoubled };
  enum Border { kZeros, kReflect, kReplicate };

  struct Tensor {
    const void* data;
    long long strides[4];  // of sample, channel, row, column in elements
  };
  // One number for each output, or none.
  struct Vector {
    const void* data;
    long long stride;
  };
  struct Taps {
    int origin, first, step, count, move;  // the j-th is first + j · step, and reads origin + j · move
  };
  // A pack's channels: they begin at `channel` of part `part`, which has `left` more of them in this group.
  struct Channels {
    int part, channel, left;
  };
  // Shared memory, besides the slabs: which input or output pixel each of the block's pixels is (no sample: none), and
  // what is the same for all of them, which would cost registers.
  struct Pixel {
    int sample, row, column, unused;
  };
  struct Common {
    int tile, phase_y, phase_x, group, first_pixel, unused[3];
    Taps y, x;
    int unused_too[2];
  };

  Tensor parts[2];         // of the input, side by side along the channels
  bool vectors[2];         // their channels may be read 16 bytes at a time
  bool inner;              // channels of the first are neighbours in memory
  Tensor mask;             // may be absent; stride 0 where one sample serves all
  bool mask_planes;        // a plane per channel
  Tensor weight;           // (outputs of all groups, channels of a group, row, column), or what of it is equivalent
  long long weight_group;  // elements from one group's first filter to the next's
  void* out;
  long long out_strides[4];
  bool out_inner;  // its channels are neighbours in memory

  int form, border, stride, dilation, shared, inverse;  // shared = gcd(stride, dilation); see `taps`
  int before[2], kernel[2], size[2], out_size[2];       // by axis; size: of x, doubled where it is read by halving
  bool halved;
  int period, pixels;            // a phase's, of all samples
  Divisor<int> rows, columns;    // of a phase
  int outputs, halves, groups;   // outputs: of a group. halves: 2 where as many gates follow the features
  int channels, first_channels;  // of a group; of the first part, all groups
  Divisor<int> packs;            // of a tap
  int width, tiles;              // outputs in a tile, gates included; how many of these
  int slabs;                     // of the inner dimension, at most
  bool rounded;                  // weights are packed in TF32

  // Of a tile of so many outputs: the block's threads; how its warps share columns, and rows at a time; shared memory.
  IRT_BOTH static constexpr int threads(int outputs) { return outputs >= 128 ? 512 : 256; }
  IRT_BOTH static constexpr int warps_across(int outputs) { return outputs >= 64 ? 4 : 2; }
  IRT_BOTH static constexpr int stage_rows(int outputs) { return 16 * (threads(outputs) / 32 / warps_across(outputs)); }
  IRT_BOTH static constexpr int memory(int outputs) {
    const int slabs = 2 * (kPixels + outputs) * kRowBytes;
    const int stage = stage_rows(outputs) * (outputs + 1) * static_cast<int>(sizeof(float));
    return kPixels * static_cast<int>(sizeof(Pixel)) + static_cast<int>(sizeof(Common)) +
           (slabs > stage ? slabs : stage);
  }
  // Where a pack lies in a row, so that neither columns of packs nor rows of them meet in one bank.
  IRT_BOTH static constexpr int place(int row, int pack) {
    return row * kRowBytes + (pack ^ (row >> 1 & 3)) * kPackBytes;
  }

  IRT_BOTH Taps taps(int axis, int phase) const {
    const int k = kernel[axis];
    if (form == kPlain) return {-before[axis], 0, 1, k, dilation};
    if (form == kDoubled) return {(phase - before[axis]) >> 1, 0, 1, k / 2 + 1, 1};
    // Output p takes tap k of input (p + before − k · dilation) / stride, where that is a whole number.
    const int at = phase + before[axis], step = stride / shared;
    const int first = static_cast<int>(static_cast<long long>(at / shared) * inverse % step);
    const int count = at % shared ? 0 : (k - first + step - 1) / step;
    const int origin = static_cast<int>((at - static_cast<long long>(first) * dilation) / stride);
    return {origin, first, step, count, -(dilation / shared)};
  }
  // The filter in a row of a tile, which gates follow in its second half; −1: none.
  IRT_BOTH int filter(int tile, int row) const {
    const int each = width / halves, half = row / each, output = tile * each + row - half * each;
    return output < outputs ? output + half * outputs : -1;
  }
  // Of pack `pack` of a tap. A pack never straddles the two parts of the input.
  IRT_BOTH Channels pack_channels(int group, int pack, int per_pack) const {
    const int start = group * channels, most = first_channels - start;
    const int own = most < 0 ? 0 : most < channels ? most : channels, own_packs = (own + per_pack - 1) / per_pack;
    if (pack < own_packs) return {0, start + pack * per_pack, own - pack * per_pack};
    const int skipped = (pack - own_packs) * per_pack;
    return {1, start + own - first_channels + skipped, channels - own - skipped};
  }
};

}  // namespace irt
