// contextual_attention on the GPU, in float whatever the tensors are, without a matrix of all scores.
//
// Two launches fill tables: the squared norm of each pixel of the background; the inverse norm of its patch, which keys
// are usable and which queries wanted. Then, for some tiles of queries at a time (csrc/plan/contextual_attention.h):
//
//   gram     products of all pixels around the tile with all pixels of the background
//   weights  patch scores as sums along its diagonals, the same sums of scores under both orders, softmax
//   paste    weights, summed along diagonals of neighbouring cells, times the background, by phase and part of the keys
//   finish   the sum over the parts, divided, in the output
//
// A thread of `weights` walks along a diagonal, queries and keys in step, so that what it sums it has in registers.
#pragma once

#include "common.cuh"
#include "plan/contextual_attention.h"

namespace irt {

__device__ __forceinline__ unsigned char* contextual_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

namespace contextual {

using Params = ContextualAttention;
using Tile = Params::Tile;

constexpr long long kNowhere = -(1ll << 62);  // in place of an offset

// −∞, in place of a logit.
__device__ __forceinline__ float none() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ __forceinline__ float* floats(void* workspace, long long at) { return static_cast<float*>(workspace) + at; }
__device__ __forceinline__ unsigned char* states_of(const Params& p, void* workspace, int sample) {
  return static_cast<unsigned char*>(workspace) + p.states_at + static_cast<long long>(sample) * p.cells;
}

// The row (axis 0) or column of the image that stands for row or column i of cells. The steps are rounded one by one,
// as in the reference, since the rounding decides ties.
__device__ __forceinline__ int source(const Params& p, int axis, int i) {
  const int at = static_cast<int>(floorf(__fadd_rn(__fmul_rn(static_cast<float>(i), p.step[axis]), 0.5f)));
  return at < p.last[axis] ? at : p.last[axis];
}

// The offset of a cell's pixel in its first channel.
__device__ __forceinline__ long long pixel(const Params& p, const Params::Tensor& t, int sample, int cell) {
  const int r = p.across.quotient(cell), c = cell - r * p.width;
  return sample * t.strides[0] + source(p, 0, r) * t.strides[2] + source(p, 1, c) * t.strides[3];
}

// Whether a cell of a mask is other than 0, which −0 is not.
__device__ __forceinline__ bool is_set(const Params::Mask& mask, int sample, int r, int c) {
  const long long at = sample * mask.strides[0] + r * mask.strides[1] + c * mask.strides[2];
  unsigned long long bits;
  switch (mask.bytes) {
    case 1: bits = static_cast<const unsigned char*>(mask.data)[at]; break;
    case 2: bits = static_cast<const unsigned short*>(mask.data)[at]; break;
    case 4: bits = static_cast<const unsigned*>(mask.data)[at]; break;
    default: bits = static_cast<const unsigned long long*>(mask.data)[at]; break;
  }
  const unsigned long long sign = mask.floating ? 1ull << (8 * mask.bytes - 1) : 0;
  return (bits & ~sign) != 0;
}

// Whether a query of these rows and columns is wanted. All threads of the block call it, once; `flag` is theirs.
__device__ __forceinline__ bool any_wanted(const Params& p, void* workspace, int sample, int top, int left, int bottom,
                                           int right, int& flag) {
  if (!p.queries.data) return true;
  const unsigned char* const states = states_of(p, workspace, sample);
  const int columns = right - left, count = (bottom - top) * columns;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int r = i / columns;
    if (states[(top + r) * p.width + left + i - r * columns] & Params::kWanted) flag = 1;
  }
  __syncthreads();
  return flag != 0;
}

// ---- products ------------------------------------------------------------------------------------------------------

// A thread's part of a product of kLines lines: 8 of them, in two groups of 4, times kColumns columns in groups of 4.
// Eight threads share the lines, kAcross the columns.
template <int kAcross, int kColumns>
struct Product {
  static constexpr int kRows = 8;
  float sum[kRows][kColumns];
  int down, across;

  __device__ __forceinline__ explicit Product(int thread) : down(thread / kAcross), across(thread % kAcross) {
    IRT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] = 0.0f;
    }
  }
  __device__ __forceinline__ int row(int i) const { return i / 4 * 32 + 4 * down + i % 4; }
  __device__ __forceinline__ int column(int j) const { return j / 4 * 4 * kAcross + 4 * across + j % 4; }

  // One step along the inner dimension, of which `a` has the lines and `b` the columns.
  __device__ __forceinline__ void add(const float* a, const float* b) {
    float x[kRows], y[kColumns];
    IRT_UNROLL
    for (int i = 0; i < kRows; i += 4) four(a + row(i), x + i);
    IRT_UNROLL
    for (int j = 0; j < kColumns; j += 4) four(b + column(j), y + j);
    IRT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] += x[i] * y[j];
    }
  }

 private:
  static __device__ __forceinline__ void four(const float* from, float* to) {
    const Pack<float, 4> pack = load_pack<4>(from);
    IRT_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = pack.values[i];
  }
};

// Walks over `slabs` slabs of the inner dimension in two halves of shared memory: fetch(slab) takes one into registers,
// stash(half) puts it into shared memory, multiply(half) uses it.
template <class Fetch, class Stash, class Multiply>
__device__ __forceinline__ void for_slabs(int slabs, const Fetch& fetch, const Stash& stash, const Multiply& multiply) {
  fetch(0);
  stash(0);
  __syncthreads();
  for (int slab = 0; slab < slabs; ++slab) {
    const bool more = slab + 1 < slabs;
    if (more) fetch(slab + 1);
    multiply(slab & 1);
    if (more) stash(~slab & 1);
    __syncthreads();
  }
}

// ---- scores --------------------------------------------------------------------------------------------------------

// Bits x of kQueries, those with from <= x < to.
__device__ __forceinline__ unsigned between(int from, int to) {
  constexpr int kMost = Params::kQueries;
  from = from < 0 ? 0 : from > kMost ? kMost : from;
  to = to < 0 ? 0 : to > kMost ? kMost : to;
  return (1u << to) - (1u << from);
}

// The queries `count` from (row, column) on and all keys, moved by `step` of the column-major order. `around`: the keys
// that are moved to the other end of the grid, instead of those that are moved to the next row.
template <int kReach>
__device__ __forceinline__ Params::Move move_by(const Params& p, const Tile& tile, int row, int column, int count,
                                                int step, bool around) {
  Params::Move move = {};
  move.keys = step * p.width - (around ? step * (p.cells - 1) : 0);
  move.from = around ? (step < 0 ? 1 : p.cells - p.width) : step < 0 ? p.width : 0;
  move.to = around ? (step < 0 ? p.width : p.cells - 1) : step > 0 ? p.cells - p.width : p.cells;

  int r = row + step, c = column;
  Params::Block block = tile.blocks[Params::kAround];
  if (r < 0) {
    block = tile.blocks[Params::kLastRows];
    r = p.height - 1;
    --c;
  } else if (r >= p.height) {
    block = tile.blocks[Params::kFirstRows];
    r = 0;
    ++c;
  }
  const int first = r * p.width + c;
  for (int x = 0; x < count; ++x) {
    if (c + x >= 0 && c + x < p.width) move.exists |= 1u << x;
  }
  for (int i = 0; i < count + 2 * kReach; ++i) {
    const int cell = first - kReach + i, at = (c - kReach + i + p.width) % p.width;
    if (cell >= 0 && cell < p.cells) move.live |= 1u << i;
    if (at > 0) move.left |= 1u << i;
    if (at < p.width - 1) move.right |= 1u << i;
  }
  for (int d = 0; d < 3; ++d) {
    move.line[d] = block.line(r + d - 1, c);
    for (int i = 0; i < count + 2 * kReach + 2; ++i) {
      const int cell = first + (d - 1) * p.width - kReach - 1 + i;
      if (cell >= 0 && cell < p.cells) move.held[d] |= 1u << i;
    }
  }
  return move;
}

// Adds the scores of the moved queries x with the keys first + x, which are moved too, to the sums of those in
// `chosen`; where scores propagate, also those of one step of the row-major order to either side.
template <int kReach>
__device__ __forceinline__ void add_scores(const Params& p, const Params::Move& move, const float* gram,
                                           const float* inverses, int first, unsigned chosen,
                                           float (&sums)[Params::kQueries]) {
  constexpr int kCells = Params::kQueries + 2 * kReach;
  const unsigned cells = static_cast<unsigned>(p.cells);
  unsigned live = 0, left = 0, right = 0;
  int column = first - kReach + Params::kQueries * p.width;  // at least 0, since a key is in the grid
  column -= p.across.quotient(column) * p.width;
  IRT_UNROLL
  for (int i = 0; i < kCells; ++i) {
    live |= (static_cast<unsigned>(first - kReach + i) < cells ? 1u : 0u) << i;
    left |= (column > 0 ? 1u : 0u) << i;
    right |= (column < p.width - 1 ? 1u : 0u) << i;
    column = column < p.width - 1 ? column + 1 : 0;
  }
  live &= move.live;
  left &= move.left;
  right &= move.right;

  float scores[kCells];
  IRT_UNROLL
  for (int i = 0; i < kCells; ++i) scores[i] = 0.0f;
  IRT_ROLL
  for (int d = 0; d < 3; ++d) {  // rows of a patch
    const int key = first + (d - 1) * p.width - kReach - 1;
    const float* at = gram + static_cast<long long>(move.line[d] - kReach - 1) * p.pitch + key;
    const unsigned held = move.held[d];
    float products[kCells + 2];
    IRT_UNROLL
    for (int i = 0; i < kCells + 2; ++i) {
      const bool is = (held >> i & 1) && static_cast<unsigned>(key + i) < cells;
      products[i] = is ? *at : 0.0f;
      at += p.pitch + 1;
    }
    IRT_UNROLL
    for (int i = 0; i < kCells; ++i) {
      scores[i] += (left >> i & 1 ? products[i] : 0.0f) + products[i + 1] + (right >> i & 1 ? products[i + 2] : 0.0f);
    }
  }
  IRT_UNROLL
  for (int i = 0; i < kCells; ++i) scores[i] = live >> i & 1 ? scores[i] * inverses[first - kReach + i] : 0.0f;
  IRT_UNROLL
  for (int x = 0; x < Params::kQueries; ++x) {
    float sum = scores[x];
    IRT_UNROLL
    for (int i = 1; i <= 2 * kReach; ++i) sum += scores[x + i];
    if (chosen >> x & 1) sums[x] += sum;
  }
}

// The largest of some logits and the sum of their exponentials, divided by the largest one's.
struct Softmax {
  float most, sum;

  __device__ __forceinline__ void add(float logit) {
    const float ratio = logit == most ? 1.0f : expf(-fabsf(logit - most));
    sum = logit > most ? sum * ratio + 1.0f : sum + ratio;
    if (logit > most) most = logit;
  }
  __device__ __forceinline__ void add(const Softmax& other) {
    const float all = other.most > most ? other.most : most;
    if (all == none()) {  // no logits, or none but NaN
      sum += other.sum;
    } else {
      sum = sum * expf(most - all) + other.sum * expf(other.most - all);
    }
    most = all;
  }
};

}  // namespace contextual

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(ContextualAttention::kThreads)
    contextual_attention_squares(const __grid_constant__ ContextualAttention p, void* workspace) {
  const int index = static_cast<int>(blockIdx.x * ContextualAttention::kThreads + threadIdx.x);
  const int sample = index / p.cells;
  if (sample >= p.batch) return;
  const long long step = p.background.strides[1];
  const T* at =
      static_cast<const T*>(p.background.data) + contextual::pixel(p, p.background, sample, index - sample * p.cells);
  float sums[4] = {};
  int c = 0;
  for (; c + 4 <= p.channels; c += 4) {
    IRT_UNROLL
    for (int i = 0; i < 4; ++i, at += step) sums[i] += to_float(*at) * to_float(*at);
  }
  for (; c < p.channels; ++c, at += step) sums[0] += to_float(*at) * to_float(*at);
  contextual::floats(workspace, p.squares_at)[index] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <bool kSum>
__global__ void __launch_bounds__(ContextualAttention::kThreads)
    contextual_attention_keys(const __grid_constant__ ContextualAttention p, void* workspace) {
  using Params = ContextualAttention;
  const int index = static_cast<int>(blockIdx.x * Params::kThreads + threadIdx.x), sample = index / p.cells;
  if (sample >= p.batch) return;
  const int cell = index - sample * p.cells, r = p.across.quotient(cell), c = cell - r * p.width;
  const float* const squares = contextual::floats(workspace, p.squares_at) + index;
  float norm = 0.0f;
  bool whole = true;  // without a hole
  for (int dr = -1; dr <= 1; ++dr) {
    for (int dc = -1; dc <= 1; ++dc) {
      if (r + dr < 0 || r + dr >= p.height || c + dc < 0 || c + dc >= p.width) continue;
      norm += squares[dr * p.width + dc];
      if (p.mask.data) whole = whole && !contextual::is_set(p.mask, sample, r + dr, c + dc);
    }
  }
  norm = kSum ? norm + p.eps : norm < p.eps ? p.eps : norm;  // NaN passes
  contextual::floats(workspace, p.inverses_at)[index] = 1.0f / sqrtf(norm);
  const bool offered = r % p.stride == 0 && c % p.stride == 0;
  const bool wanted = !p.queries.data || contextual::is_set(p.queries, sample, r, c);
  contextual::states_of(p, workspace, sample)[cell] = static_cast<unsigned char>(
      (offered ? Params::kOffered : 0) | (offered && whole ? Params::kUsable : 0) | (wanted ? Params::kWanted : 0));
}

template <class T>
__global__ void __launch_bounds__(ContextualAttention::kGramThreads, 4)
    contextual_attention_gram(const __grid_constant__ ContextualAttention p, void* workspace, int round) {
  using Params = ContextualAttention;
  constexpr int kSlab = Params::kSlab, kLines = Params::kLines, kKeys = Params::kGramKeys;
  constexpr int kThreads = Params::kGramThreads, kLineLoads = kSlab * kLines / kThreads;
  constexpr int kKeyLoads = kSlab * kKeys / kThreads;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int rows = p.gram_rows(), rest = block / rows, slot = rest / p.gram_columns();
  const int first_line = (block - rest * rows) * kLines, first_key = (rest - slot * p.gram_columns()) * kKeys;
  const int unit = round * p.slots + slot;
  if (unit >= p.units) return;
  const Params::Tile tile = p.tile(unit);
  if (first_line >= tile.gram_lines) return;
  Params::GramMemory& memory = *reinterpret_cast<Params::GramMemory*>(contextual_memory());
  if (!contextual::any_wanted(p, workspace, tile.sample, tile.top, tile.left, tile.bottom, tile.right, memory.wanted))
    return;
  if (thread < kLines) {
    int cell = -1;
    IRT_UNROLL
    for (int i = 0; i < 3; ++i) {
      const Params::Block& lines = tile.blocks[i];
      const int at = first_line + thread - lines.first;
      if (at >= 0 && at < lines.count) {
        const int r = at / lines.pitch;
        cell = (lines.row + r) * p.width + lines.column + at - r * lines.pitch;
      }
    }
    const bool exists = cell >= 0 && cell < p.cells;
    memory.line_at[thread] = exists ? contextual::pixel(p, p.foreground, tile.sample, cell) : contextual::kNowhere;
  }
  const bool exists = first_key + thread < p.cells;
  memory.key_at[thread] =
      exists ? contextual::pixel(p, p.background, tile.sample, first_key + thread) : contextual::kNowhere;
  __syncthreads();

  // Neighbouring threads load what neighbours in memory are. Load i of `loads` is of (channel, line) of a slab.
  const auto locate = [thread](bool inner, int lines, int loads, int i, int& channel, int& line) {
    channel = inner ? thread % kSlab : thread / lines + i * (kSlab / loads);
    line = inner ? thread / kSlab + i * (lines / loads) : thread % lines;
  };
  const auto load = [&p](const Params::Tensor& t, long long at, int channel) {
    const bool is = at != contextual::kNowhere && channel < p.channels;
    return is ? to_float(static_cast<const T*>(t.data)[at + channel * t.strides[1]]) : 0.0f;
  };
  float line_values[kLineLoads], key_values[kKeyLoads];
  contextual::Product<16, 8> product(thread);
  const auto fetch = [&](int slab) {
    int channel, line;
    IRT_UNROLL
    for (int i = 0; i < kLineLoads; ++i) {
      locate(p.foreground.channels_inner, kLines, kLineLoads, i, channel, line);
      line_values[i] = load(p.foreground, memory.line_at[line], slab * kSlab + channel);
    }
    IRT_UNROLL
    for (int i = 0; i < kKeyLoads; ++i) {
      locate(p.background.channels_inner, kKeys, kKeyLoads, i, channel, line);
      key_values[i] = load(p.background, memory.key_at[line], slab * kSlab + channel);
    }
  };
  const auto stash = [&](int half) {
    int channel, line;
    IRT_UNROLL
    for (int i = 0; i < kLineLoads; ++i) {
      locate(p.foreground.channels_inner, kLines, kLineLoads, i, channel, line);
      memory.lines[half][channel][line] = line_values[i];
    }
    IRT_UNROLL
    for (int i = 0; i < kKeyLoads; ++i) {
      locate(p.background.channels_inner, kKeys, kKeyLoads, i, channel, line);
      memory.keys[half][channel][line] = key_values[i];
    }
  };
  const auto multiply = [&](int half) {
    IRT_ROLL
    for (int k = 0; k < kSlab; ++k) product.add(memory.lines[half][k], memory.keys[half][k]);
  };
  contextual::for_slabs((p.channels + kSlab - 1) / kSlab, fetch, stash, multiply);

  float* const gram = contextual::floats(workspace, p.gram_at + slot * p.gram_slot);
  IRT_UNROLL
  for (int i = 0; i < product.kRows; ++i) {
    const int line = first_line + product.row(i);
    IRT_UNROLL
    for (int j = 0; j < 8; j += 4) {
      const int key = first_key + product.column(j);
      if (line >= tile.gram_lines || key >= p.pitch) continue;
      const Pack<float, 4> four = {
          {product.sum[i][j], product.sum[i][j + 1], product.sum[i][j + 2], product.sum[i][j + 3]}};
      store_pack(gram + static_cast<long long>(line) * p.pitch + key, four);
    }
  }
}

template <bool kPropagate>
__global__ void __launch_bounds__(ContextualAttention::kWeightThreads, 2)
    contextual_attention_weights(const __grid_constant__ ContextualAttention p, void* workspace, int round) {
  using Params = ContextualAttention;
  constexpr int kReach = kPropagate ? 1 : 0, kThreads = Params::kWeightThreads, kQueries = Params::kQueries;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int segments = p.weight_segments(), rest = block / segments, slot = rest / p.weight_rows();
  const int unit = round * p.slots + slot;
  if (unit >= p.units) return;
  Params::WeightMemory& memory = *reinterpret_cast<Params::WeightMemory*>(contextual_memory());
  if (thread == 0) memory.tile = p.tile(unit);
  __syncthreads();
  const Params::Tile& tile = memory.tile;
  const int row = tile.weight_top + rest - slot * p.weight_rows();
  const int column = tile.weight_left + (block - rest * segments) * kQueries;
  if (row >= tile.weight_bottom || column >= tile.weight_right) return;
  const int count = tile.weight_right - column < kQueries ? tile.weight_right - column : kQueries;
  const int top = row - 1 < tile.top ? tile.top : row - 1, bottom = row + 2 > tile.bottom ? tile.bottom : row + 2;
  const int left = column - 1 < tile.left ? tile.left : column - 1;
  const int right = column + count + 1 > tile.right ? tile.right : column + count + 1;
  if (!contextual::any_wanted(p, workspace, tile.sample, top, left, bottom, right, memory.wanted)) return;
  constexpr int kMoves = kPropagate ? 5 : 1;  // by 0; by -1 and 1, each to the next row and to the other end
  if (thread < kMoves) {
    const int step = thread == 0 ? 0 : thread < 3 ? -1 : 1;
    memory.moves[thread] = contextual::move_by<kReach>(p, tile, row, column, count, step, thread % 2 == 0 && step != 0);
  }
  __syncthreads();

  const float* const gram = contextual::floats(workspace, p.gram_at + slot * p.gram_slot);
  float* const weights = contextual::floats(workspace, p.weights_at + slot * p.weight_slot) +
                         static_cast<long long>(tile.weight_line(row, column)) * p.pitch;
  const float* const inverses =
      contextual::floats(workspace, p.inverses_at) + static_cast<long long>(tile.sample) * p.cells;
  const unsigned char* const states = contextual::states_of(p, workspace, tile.sample);
  contextual::Softmax found[kQueries];
  IRT_UNROLL
  for (int x = 0; x < kQueries; ++x) found[x] = {contextual::none(), 0.0f};
  int masked = 0;

  for (int diagonal = thread - (kQueries - 1); diagonal < p.cells; diagonal += kThreads) {
    float sums[kQueries] = {};
    IRT_ROLL
    for (int i = 0; i < kMoves; ++i) {
      const Params::Move& move = memory.moves[i];
      const unsigned chosen = contextual::between(move.from - diagonal, move.to - diagonal) & move.exists;
      if (chosen) contextual::add_scores<kReach>(p, move, gram, inverses, diagonal + move.keys, chosen, sums);
    }
    IRT_UNROLL
    for (int x = 0; x < kQueries; ++x) {
      const int key = diagonal + x;
      if (key < 0 || key >= p.cells || x >= count) continue;
      const unsigned char state = states[key];
      const bool usable = state & Params::kUsable;
      const float logit = p.scale * sums[x];
      if (usable) found[x].add(logit);
      if (x == 0 && !usable && state & Params::kOffered) ++masked;
      weights[x * static_cast<long long>(p.pitch) + key] = usable ? logit : contextual::none();
    }
  }

  IRT_UNROLL
  for (int x = 0; x < kQueries; ++x) {
    memory.most[x][thread] = found[x].most;
    memory.sums[x][thread] = found[x].sum;
  }
  memory.masked[thread] = masked;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    for (int x = 0; x < count; ++x) {
      contextual::Softmax all = {memory.most[x][thread], memory.sums[x][thread]};
      all.add({memory.most[x][thread + half], memory.sums[x][thread + half]});
      memory.most[x][thread] = all.most;
      memory.sums[x][thread] = all.sum;
    }
    memory.masked[thread] += memory.masked[thread + half];
  }
  __syncthreads();
  for (int x = 0; x < count; ++x) {
    contextual::Softmax all = {memory.most[x][0], memory.sums[x][0]};
    const int others = memory.masked[0];  // one key with their number as its weight
    if (p.virtual_key && others > 0) all.add({0.0f, static_cast<float>(others)});
    const float inverse = 1.0f / all.sum;
    float* const line = weights + x * static_cast<long long>(p.pitch);
    for (int key = thread; key < p.cells; key += kThreads) line[key] = expf(line[key] - all.most) * inverse;
  }
}

template <class T, int kChannels>
__global__ void __launch_bounds__(ContextualAttention::kThreads, 2)
    contextual_attention_paste(const __grid_constant__ ContextualAttention p, void* workspace, int round) {
  using Params = ContextualAttention;
  using Memory = Params::PasteMemory<kChannels>;
  constexpr int kSlab = Params::kSlab, kLines = Params::kLines, kPhases = Params::kPhases;
  constexpr int kPhaseThreads = Params::kThreads / kPhases, kLoads = kSlab * kChannels / kPhaseThreads;
  constexpr int kLineLoads = kSlab * kLines / Params::kThreads, kColumns = kChannels / 8;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int rest = block / p.channel_blocks;
  const int first_channel = (block - rest * p.channel_blocks) * kChannels;
  const int rows = p.paste_rows(), first_line = rest % rows * kLines;
  rest /= rows;
  const int slot = rest / p.splits, split = rest - slot * p.splits, unit = round * p.slots + slot;
  if (unit >= p.units) return;
  const Params::Tile tile = p.tile(unit);
  Memory& memory = *reinterpret_cast<Memory*>(contextual_memory());
  const int from_row = tile.top + first_line / p.tile_width;
  if (from_row >= tile.bottom) return;
  int to_row = tile.top + (first_line + kLines - 1) / p.tile_width + 1;
  if (to_row > tile.bottom) to_row = tile.bottom;
  if (!contextual::any_wanted(p, workspace, tile.sample, from_row, tile.left, to_row, tile.right, memory.wanted))
    return;

  // What is needed after the product, since registers are short. Partial outputs lie by split and phase, then by query
  // and channel in the order of the output.
  if (thread == 0) {
    memory.out = contextual::floats(workspace, p.gram_at + slot * p.gram_slot + split * p.split_floats());
    memory.first_line = first_line;
    memory.first_channel = first_channel;
  }
  // Which neighbours something in the grid has.
  constexpr unsigned kUp = 1, kDown = 2, kLeft = 4, kRight = 8, kItself = 16;
  const auto neighbours = [&p](int r, int c) {
    return (r > 0 ? kUp : 0) | (r < p.height - 1 ? kDown : 0) | (c > 0 ? kLeft : 0) | (c < p.width - 1 ? kRight : 0) |
           kItself;
  };
  // This thread's queries, with one key of each slab.
  const int below = tile.weight_width() * p.pitch + p.width, beside = p.pitch + 1;
  const float* const weights = contextual::floats(workspace, p.weights_at + slot * p.weight_slot);
  const float* lines[kLineLoads];
  unsigned cells = 0;  // a byte for each
  IRT_UNROLL
  for (int i = 0; i < kLineLoads; ++i) {
    const int index = first_line + thread / kSlab + i * (kLines / kLineLoads), down = index / p.tile_width;
    const int r = tile.top + down, c = tile.left + index - down * p.tile_width;
    const bool exists = r < tile.bottom && c < tile.right;
    cells |= (exists ? neighbours(r, c) : 0) << 8 * i;
    lines[i] = weights + (exists ? tile.weight_line(r, c) * static_cast<long long>(p.pitch) : 0);
  }
  // This thread's phase of the background, with some channels and keys of each slab.
  const int phase = thread / kPhaseThreads, within = thread % kPhaseThreads;
  const auto locate = [&p, within](int i, int& channel, int& key) {
    channel = p.background.channels_inner ? within % kChannels : within / kSlab + i * (kChannels / kLoads);
    key = p.background.channels_inner ? within / kChannels + i * (kSlab / kLoads) : within % kSlab;
  };
  const T* const background = static_cast<const T*>(p.background.data) + tile.sample * p.background.strides[0] +
                              phase / 2 * p.background.strides[2] + phase % 2 * p.background.strides[3];

  const int first_key = split * p.split_keys;
  const int last_key = first_key + p.split_keys < p.cells ? first_key + p.split_keys : p.cells;
  float line_values[kLineLoads][kPhases], values[kLoads];
  contextual::Product<8, kColumns> product(within);
  const auto fetch = [&](int slab) {
    const int key = first_key + slab * kSlab + thread % kSlab;
    const int key_row = p.across.quotient(key);
    const unsigned around = key < last_key ? neighbours(key_row, key - key_row * p.width) : 0;
    IRT_UNROLL
    for (int i = 0; i < kLineLoads; ++i) {
      const unsigned both = cells >> 8 * i & around;
      const auto row = [&](const float* at, bool is, float& even, float& odd) {
        const float centre = is ? *at : 0.0f;
        even = (is && both & kLeft ? at[-beside] : 0.0f) + centre;
        odd = centre + (is && both & kRight ? at[beside] : 0.0f);
      };
      const float* const at = lines[i] + key;
      float even[3], odd[3];
      row(at - below, both & kUp, even[0], odd[0]);
      row(at, both & kItself, even[1], odd[1]);
      row(at + below, both & kDown, even[2], odd[2]);
      line_values[i][0] = even[0] + even[1];
      line_values[i][1] = odd[0] + odd[1];
      line_values[i][2] = even[1] + even[2];
      line_values[i][3] = odd[1] + odd[2];
    }
    IRT_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      int channel, at;
      locate(i, channel, at);
      channel += first_channel;
      at += first_key + slab * kSlab;
      const int r = p.across.quotient(at), c = at - r * p.width;
      const bool is = at < last_key && channel < p.channels;
      values[i] = is ? to_float(background[2 * r * p.background.strides[2] + 2 * c * p.background.strides[3] +
                                           channel * p.background.strides[1]])
                     : 0.0f;
    }
  };
  const auto stash = [&](int half) {
    IRT_UNROLL
    for (int i = 0; i < kLineLoads; ++i) {
      IRT_UNROLL
      for (int f = 0; f < kPhases; ++f) {
        memory.lines[half][f][thread % kSlab][thread / kSlab + i * (kLines / kLineLoads)] = line_values[i][f];
      }
    }
    IRT_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      int channel, key;
      locate(i, channel, key);
      memory.values[half][phase][key][channel] = values[i];
    }
  };
  const auto multiply = [&](int half) {
    IRT_ROLL
    for (int k = 0; k < kSlab; ++k) product.add(memory.lines[half][phase][k], memory.values[half][phase][k]);
  };
  contextual::for_slabs((last_key - first_key + kSlab - 1) / kSlab, fetch, stash, multiply);

  float* const out = memory.out + static_cast<long long>(phase) * p.tile_cells() * p.channels;
  const int cell_step = p.out.channels_inner ? p.channels : 1, channel_step = p.out.channels_inner ? 1 : p.tile_cells();
  IRT_UNROLL
  for (int i = 0; i < product.kRows; ++i) {
    const int line = memory.first_line + product.row(i);
    IRT_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const int channel = memory.first_channel + product.column(j);
      if (line < p.tile_cells() && channel < p.channels) {
        out[static_cast<long long>(line) * cell_step + static_cast<long long>(channel) * channel_step] =
            product.sum[i][j];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(ContextualAttention::kThreads)
    contextual_attention_finish(const __grid_constant__ ContextualAttention p, void* workspace, int round) {
  using Params = ContextualAttention;
  const int slot = static_cast<int>(blockIdx.x) / p.finish_blocks, unit = round * p.slots + slot;
  if (unit >= p.units) return;
  const Params::Tile tile = p.tile(unit);
  const int index =
      (static_cast<int>(blockIdx.x) - slot * p.finish_blocks) * Params::kThreads + static_cast<int>(threadIdx.x);
  const int rest = p.finish_sizes[0].quotient(index), inner = index - rest * p.finish_sizes[0].value;
  const int outer = p.finish_sizes[1].quotient(rest), middle = rest - outer * p.finish_sizes[1].value;
  const int channel = p.out.channels_inner ? inner : outer, down = p.out.channels_inner ? outer : middle;
  const int across = p.out.channels_inner ? middle : inner;  // of the tile's first pixel
  const int y = 2 * tile.top + down, x = 2 * tile.left + across, r = y / 2, c = x / 2;
  if (r >= tile.bottom || c >= tile.right || channel >= p.channels) return;

  float value = 0.0f;
  if (contextual::states_of(p, workspace, tile.sample)[r * p.width + c] & Params::kWanted) {
    const int cell = down / 2 * p.tile_width + across / 2, phase = 2 * (y % 2) + x % 2;
    const long long at = p.out.channels_inner ? static_cast<long long>(cell) * p.channels + channel
                                              : static_cast<long long>(channel) * p.tile_cells() + cell;
    const float* partial = contextual::floats(workspace, p.gram_at + slot * p.gram_slot) + at +
                           static_cast<long long>(phase) * p.tile_cells() * p.channels;
    for (int split = 0; split < p.splits; ++split, partial += p.split_floats()) value += *partial;
    const bool one_row = y == 0 || y == 2 * p.height - 1, one_column = x == 0 || x == 2 * p.width - 1;
    value *= p.overlap ? (one_row ? 1.0f : 0.5f) * (one_column ? 1.0f : 0.5f) : 0.25f;
  }
  T* const out = static_cast<T*>(p.out.data) + tile.sample * p.out.strides[0] + channel * p.out.strides[1] +
                 y * p.out.strides[2] + x * p.out.strides[3];
  from_float(value, *out);
}

}  // namespace irt
