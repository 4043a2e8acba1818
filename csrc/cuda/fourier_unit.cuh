// fourier_unit on the GPU: irfft2(ReLU(weight · rfft2(x) + bias)) + residual, with spectra in float whatever x is.
//
// Three launches: rows forward (and the weights to float); columns forward, the mix of channels, columns inverse, in
// shared memory from beginning to end; rows inverse. Where a column of all channels is too large for shared memory, the
// second launch becomes three: columns forward, mix, columns inverse.
//
// Two neighbouring rows a and b are one complex transform, that of a + ib, in either direction and at any width. The
// mix treats all frequencies alike, so it takes columns in the order in which their forward transform leaves them. The
// fused kernel has more blocks than columns, because 33 columns do not fill a GPU: each block forms one slice of the
// output's channels, and the blocks of a column repeat its forward transform.
#pragma once

#include "fft.cuh"
#include "plan/fourier_unit.h"

namespace irt {

// Blocks of an SM for which the compiler leaves registers; the fused kernel's shared memory allows no more than two.
constexpr int kBlocks = 4, kMixBlocks = 2;

__device__ __forceinline__ float2* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<float2*>(memory);
}

// ---- the spectra in the workspace ----------------------------------------------------------------------------------

// A column: all channels and y of one batch and kx. `output` tells the two spectra apart.
__device__ __forceinline__ float2* column_at(const FourierUnit& p, void* workspace, bool output, int column) {
  const long long size = static_cast<long long>(output ? p.outputs : p.inputs) * p.height;
  float* const spectra = static_cast<float*>(workspace) + (output ? p.outputs_at : p.inputs_at);
  return reinterpret_cast<float2*>(spectra) + column * size;
}
__device__ __forceinline__ int within_column(const FourierUnit& p, int channels, int c, int y) {
  return p.channels_inner ? y * channels + c : c * p.height + y;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// The pairs of rows of a block: pair i is rows y(i) and y(i) + 1 of channel c(i). Its pairs are neighbours in a column.
struct RowTile {
  int b, c, y, count;
  bool channels_inner;

  __device__ __forceinline__ RowTile(const FourierUnit& p, int channels) : channels_inner(p.channels_inner) {
    const int vertical = (p.height + 1) / 2, inner = channels_inner ? channels : vertical;
    const int tiles = (inner + p.pairs.value - 1) / p.pairs.value, rest = static_cast<int>(blockIdx.x) / tiles;
    const int first = (static_cast<int>(blockIdx.x) - rest * tiles) * p.pairs.value;
    const int outer = channels_inner ? vertical : channels;
    b = rest / outer;
    c = channels_inner ? first : rest - b * outer;
    y = 2 * (channels_inner ? rest - b * outer : first);
    count = inner - first < p.pairs.value ? inner - first : p.pairs.value;
  }
  __device__ __forceinline__ int channel(int pair) const { return channels_inner ? c + pair : c; }
  __device__ __forceinline__ int top(int pair) const { return channels_inner ? y : y + 2 * pair; }

  // Element x of a pair's first row.
  template <class T>
  __device__ __forceinline__ T* at(const FourierUnit::Tensor& t, int pair, int x) const {
    return static_cast<T*>(t.data) + b * t.strides[0] + channel(pair) * t.strides[1] + top(pair) * t.strides[2] +
           x * t.strides[3];
  }

  // Calls f(pair, x) for all elements, neighbouring threads at neighbouring addresses.
  template <class F>
  __device__ __forceinline__ void for_elements(const FourierUnit& p, const F& f) const {
    const auto existing = [&](int pair, int x) {
      if (pair < count) f(pair, x);
    };
    if (channels_inner) {
      for_each(p.pairs, p.width, existing);
    } else {
      for_each(p.wide, p.pairs.value, [&](int x, int pair) { existing(pair, x); });
    }
  }
};

// The shared memory of a row kernel, with its tables.
struct RowMemory {
  float2 *z, *roots, *scratch;
  unsigned short* places;

  __device__ __forceinline__ explicit RowMemory(const FourierUnit& p)
      : z(shared_memory()),
        roots(z + p.pairs.value * p.row.pitch()),
        scratch(roots + p.width),
        places(reinterpret_cast<unsigned short*>(scratch + p.row.scratch)) {
    fill_roots(roots, p.width);
    for (int k = threadIdx.x; k < p.width; k += FourierUnit::kThreads) {
      places[k] = static_cast<unsigned short>(place(p.row, k));
    }
  }
};

// Row `o` of the weights and its bias, as floats.
template <class T>
__device__ __forceinline__ void pack_weights(const FourierUnit& p, float* packed, int o) {
  const T* const weight = static_cast<const T*>(p.weight) + o * p.weight_strides[0];
  const T* const bias = static_cast<const T*>(p.bias);
  const bool exists = o < 2 * p.outputs;
  for (int k = threadIdx.x; k < p.weight_pitch; k += FourierUnit::kThreads) {
    const bool inside = exists && k < 2 * p.inputs;
    packed[static_cast<long long>(o) * p.weight_pitch + k] = inside ? to_float(weight[k * p.weight_strides[1]]) : 0.0f;
  }
  if (threadIdx.x == 0) packed[p.bias_at + o] = exists && bias ? to_float(bias[o * p.bias_stride]) : 0.0f;
}

// x -> spectra of its rows, with the scale of the forward transform; the last blocks pack the weights.
template <class T>
__global__ void __launch_bounds__(FourierUnit::kThreads, kBlocks)
    fourier_unit_rows(const __grid_constant__ FourierUnit p, void* workspace) {
  const int block = static_cast<int>(blockIdx.x);
  if (block >= p.row_blocks) return pack_weights<T>(p, static_cast<float*>(workspace), block - p.row_blocks);
  const RowMemory memory(p);
  const RowTile tile(p, p.inputs);
  tile.for_elements(p, [&](int pair, int x) {
    const T* const at = tile.at<const T>(p.x, pair, x);
    const float below = tile.top(pair) + 1 < p.height ? to_float(at[p.x.strides[2]]) : 0.0f;
    memory.z[pair * p.row.pitch() + x] = make_float2(to_float(*at), below);
  });
  __syncthreads();
  transform<false>(p.row, memory.z, p.pairs, memory.roots, memory.scratch);
  const float scale = 0.5f * p.scale;
  for_each(p.pairs, p.half, [&](int pair, int k) {
    if (pair >= tile.count) return;
    const float2* const z = memory.z + pair * p.row.pitch();
    const float2 u = z[memory.places[k]], v = z[memory.places[k ? p.width - k : 0]];  // v: at the opposite frequency
    const int c = tile.channel(pair), y = tile.top(pair);
    float2* const to = column_at(p, workspace, false, tile.b * p.half + k);
    to[within_column(p, p.inputs, c, y)] = make_float2(scale * (u.x + v.x), scale * (u.y - v.y));
    if (y + 1 == p.height) return;
    to[within_column(p, p.inputs, c, y + 1)] = make_float2(scale * (u.y + v.y), scale * (v.x - u.x));
  });
}

// Spectra of rows -> out. At kx = 0 and width / 2 a real row has no imaginary part: what is there is ignored.
template <class T>
__global__ void __launch_bounds__(FourierUnit::kThreads, kBlocks)
    fourier_unit_inverse_rows(const __grid_constant__ FourierUnit p, void* workspace) {
  const RowMemory memory(p);
  const RowTile tile(p, p.outputs);
  __syncthreads();
  for_each(p.pairs, p.half, [&](int pair, int k) {
    if (pair >= tile.count) return;
    const float2* const from = column_at(p, workspace, true, tile.b * p.half + k);
    const int c = tile.channel(pair), y = tile.top(pair);
    float2 a = from[within_column(p, p.outputs, c, y)], b = make_float2(0.0f, 0.0f);
    if (y + 1 < p.height) b = from[within_column(p, p.outputs, c, y + 1)];
    const bool single = k == 0 || 2 * k == p.width;  // its own opposite
    if (single) a.y = b.y = 0.0f;
    float2* const z = memory.z + pair * p.row.pitch();
    z[memory.places[k]] = make_float2(a.x - b.y, a.y + b.x);
    if (!single) z[memory.places[p.width - k]] = make_float2(a.x + b.y, b.x - a.y);
  });
  __syncthreads();
  transform<true>(p.row, memory.z, p.pairs, memory.roots, memory.scratch);
  tile.for_elements(p, [&](int pair, int x) {
    const float2 z = memory.z[pair * p.row.pitch() + x];
    const int rows = tile.top(pair) + 1 < p.height ? 2 : 1;
    for (int row = 0; row < rows; ++row) {
      float value = p.scale * (row ? z.y : z.x);
      if (p.residual.data) value += to_float(tile.at<const T>(p.residual, pair, x)[row * p.residual.strides[2]]);
      from_float(value, tile.at<T>(p.out, pair, x)[row * p.out.strides[2]]);
    }
  });
}

// ---- columns -------------------------------------------------------------------------------------------------------

// Calls f(index in shared memory, index in the column) for the channels from `first` on, as many as there are lines.
template <class F>
__device__ __forceinline__ void for_column(const FourierUnit& p, int channels, int first, const Divisor<int>& lines,
                                           const F& f) {
  const auto existing = [&](int line, int y) {
    if (first + line < channels) f(line * p.column.pitch() + y, within_column(p, channels, first + line, y));
  };
  if (p.channels_inner) {
    for_each(lines, p.height, existing);
  } else {
    for_each(p.tall, lines.value, [&](int y, int line) { existing(line, y); });
  }
}

// A thread's part of W · z + bias: its warp's channels at the places y, y + 32, …
template <int kPerLane>
struct Mix {
  static constexpr int kRows = 2 * FourierUnit::kWarpChannels;  // of W: real and imaginary parts in turn
  float sum[kRows][kPerLane];

  __device__ __forceinline__ explicit Mix(const float* bias) {
    IRT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      IRT_UNROLL
      for (int s = 0; s < kPerLane; ++s) sum[r][s] = bias[r];
    }
  }

  // Adds `count` pairs of channels, the first ones of `weight` and of `z`. Places beyond `height` repeat the last one.
  __device__ __forceinline__ void add(const float* weight, int weight_pitch, const float2* z, int pitch, int count,
                                      int y, int height) {
    for (int pair = 0; pair < count; ++pair, z += 2 * pitch) {
      float2 a[kPerLane], b[kPerLane];
      IRT_UNROLL
      for (int s = 0; s < kPerLane; ++s) {
        const int at = y + 32 * s < height ? y + 32 * s : height - 1;
        a[s] = z[at];
        b[s] = z[at + pitch];
      }
      IRT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float4 w = *reinterpret_cast<const float4*>(weight + static_cast<long long>(r) * weight_pitch + 4 * pair);
        IRT_UNROLL
        for (int s = 0; s < kPerLane; ++s) {
          sum[r][s] += w.x * a[s].x;
          sum[r][s] += w.y * a[s].y;
          sum[r][s] += w.z * b[s].x;
          sum[r][s] += w.w * b[s].y;
        }
      }
    }
  }

  // Calls f(channel of the warp's, y, ReLU of the real and imaginary part) for all places. NaN passes the ReLU.
  template <class F>
  __device__ __forceinline__ void for_results(int y, int height, const F& f) const {
    IRT_UNROLL
    for (int s = 0; s < kPerLane; ++s) {
      IRT_UNROLL
      for (int c = 0; c < FourierUnit::kWarpChannels; ++c) {
        const float re = sum[2 * c][s], im = sum[2 * c + 1][s];
        const float2 value = make_float2(re < 0.0f ? 0.0f : re, im < 0.0f ? 0.0f : im);
        if (y + 32 * s < height) f(c, y + 32 * s, value);
      }
    }
  }
};

// A column of all channels: transformed, mixed into a slice of the output's channels and transformed back.
template <int kPerLane>
__global__ void __launch_bounds__(FourierUnit::kThreads, kMixBlocks)
    fourier_unit_columns(const __grid_constant__ FourierUnit p, void* workspace) {
  const int block = static_cast<int>(blockIdx.x), column = block / p.slices, slice = block - column * p.slices;
  const int lines = 2 * p.channel_pairs() > p.slice.value ? 2 * p.channel_pairs() : p.slice.value;
  const int pitch = p.column.pitch();
  float2 *const z = shared_memory(), *const roots = z + lines * pitch, *const scratch = roots + p.height;
  fill_roots(roots, p.height);
  const float2* const from = column_at(p, workspace, false, column);
  for_column(p, p.inputs, 0, p.lines, [&](int here, int there) { z[here] = from[there]; });
  if (p.inputs & 1) {  // the line that completes the last pair has weights of 0, so it must be finite
    for (int y = threadIdx.x; y < p.height; y += FourierUnit::kThreads)
      z[p.inputs * pitch + y] = make_float2(0.0f, 0.0f);
  }
  __syncthreads();
  transform<false>(p.column, z, p.lines, roots, scratch);

  const int warp = threadIdx.x / 32, tile = warp / p.lanes_tiles;
  const int y = (warp - tile * p.lanes_tiles) * 32 * kPerLane + threadIdx.x % 32;
  const bool busy = tile < p.rows_tiles;  // a height may leave warps over
  const int channel = (busy ? tile : 0) * FourierUnit::kWarpChannels, row = 2 * (slice * p.slice.value + channel);
  const float* const packed = static_cast<const float*>(workspace);
  Mix<kPerLane> mix(packed + p.bias_at + row);
  const float* const weight = packed + static_cast<long long>(row) * p.weight_pitch;
  if (busy) mix.add(weight, p.weight_pitch, z, pitch, p.channel_pairs(), y, p.height);
  __syncthreads();  // all of z has been read
  if (busy) mix.for_results(y, p.height, [&](int c, int at, float2 value) { z[(channel + c) * pitch + at] = value; });
  __syncthreads();
  transform<true>(p.column, z, p.slice, roots, scratch);
  float2* const to = column_at(p, workspace, true, column);
  for_column(p, p.outputs, slice * p.slice.value, p.slice, [&](int here, int there) { to[there] = z[here]; });
}

// Columns of some channels, in place in the workspace: those of x forward, those of the output inverse.
template <bool kInverse>
__global__ void __launch_bounds__(FourierUnit::kThreads, kBlocks)
    fourier_unit_transform(const __grid_constant__ FourierUnit p, void* workspace) {
  const int channels = kInverse ? p.outputs : p.inputs, tiles = (channels + p.lines.value - 1) / p.lines.value;
  const int column = static_cast<int>(blockIdx.x) / tiles;
  const int first = (static_cast<int>(blockIdx.x) - column * tiles) * p.lines.value;
  float2 *const z = shared_memory(), *const roots = z + p.lines.value * p.column.pitch();
  float2* const spectra = column_at(p, workspace, kInverse, column);
  fill_roots(roots, p.height);
  for_column(p, channels, first, p.lines, [&](int here, int there) { z[here] = spectra[there]; });
  __syncthreads();
  transform<kInverse>(p.column, z, p.lines, roots, roots + p.height);
  for_column(p, channels, first, p.lines, [&](int here, int there) { spectra[there] = z[here]; });
}

// The mix on its own: a block has a slice of the output's channels at 32 · kPerLane places, the input's come in tiles.
template <int kPerLane>
__global__ void __launch_bounds__(FourierUnit::kThreads, kMixBlocks)
    fourier_unit_mix(const __grid_constant__ FourierUnit p, void* workspace) {
  constexpr int kHeight = 32 * kPerLane, kPitch = kHeight + 1, kChannels = FourierUnit::kMixChannels;
  const int tiles = (p.height + kHeight - 1) / kHeight;
  const int block = static_cast<int>(blockIdx.x), rest = block / p.slices, column = rest / tiles;
  const int top = (rest - column * tiles) * kHeight, lane = threadIdx.x % 32;
  const int warp_channel = static_cast<int>(threadIdx.x) / 32 * FourierUnit::kWarpChannels;
  const int channel = (block - rest * p.slices) * p.slice.value + warp_channel;
  const float* const packed = static_cast<const float*>(workspace);
  const float* const weight = packed + 2ll * channel * p.weight_pitch;
  const float2* const from = column_at(p, workspace, false, column);
  float2* const z = shared_memory();
  Mix<kPerLane> mix(packed + p.bias_at + 2 * channel);
  for (int first = 0; first < p.inputs; first += kChannels) {
    for (int i = threadIdx.x; i < kChannels * kHeight; i += FourierUnit::kThreads) {
      const int line = p.channels_inner ? i % kChannels : i / kHeight,
                y = p.channels_inner ? i / kChannels : i % kHeight;
      const bool inside = first + line < p.inputs && top + y < p.height;
      z[line * kPitch + y] = inside ? from[within_column(p, p.inputs, first + line, top + y)] : make_float2(0.0f, 0.0f);
    }
    __syncthreads();
    const int left = p.channel_pairs() - first / 2, count = left < kChannels / 2 ? left : kChannels / 2;
    mix.add(weight + 2 * first, p.weight_pitch, z, kPitch, count, lane, kHeight);
    __syncthreads();
  }
  float2* const to = column_at(p, workspace, true, column);
  mix.for_results(top + lane, p.height, [&](int c, int y, float2 value) {
    if (channel + c < p.outputs) to[within_column(p, p.outputs, channel + c, y)] = value;
  });
}

}  // namespace irt
