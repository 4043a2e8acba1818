// window_attention on the GPU: a block takes some queries of one window and head, and all keys of the window.
//
// Rolling and cutting are addresses (plan/windows.h); what is added to a logit is never in memory but for a number per
// key, the mask's, and a bias. Keys and values come 64 at a time, by asynchronous copies as large as strides allow.
// Softmax is taken online: sums are rescaled whenever the largest logit grows, which with windows of up to 8 × 8 never
// happens. Logits and softmax are float32. Products of float32 are fused multiply-adds whatever torch's switches for
// TF32 say: contextual scores are IEEE in this library. Those of halves are tensor cores', and the weights' sum is that
// of the rounded weights, so that what all values share is kept.
//
// Small weights. Masked keys weigh about e⁻¹⁰⁰, 4·10⁻⁴⁴, which float32 holds with one digit, and bfloat16 not at all.
// They matter where all other values are 0. So float32 and bfloat16 weigh with 2²⁰·e^(s − max), the square of
// 2¹⁰·e^((s − max)/2); values may be as large as 10³⁰. float16 has no such range, and no use for it.
//
// Considered:
// - Leaving invalid keys out, as the CPU kernel does: see kernels/window_attention.py.
// - Two halves of shared memory, one being filled: only windows of more than 64 tokens have a second round of keys, and
//   the float32 heads of 64 channels would not fit. Measure first.
#pragma once

#include "activation.cuh"
#include "mma.cuh"
#include "plan/window_attention.h"

namespace irt {

__device__ __forceinline__ unsigned char* window_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

namespace window {

using Params = WindowAttention;
constexpr int kKeys = Params::kKeys, kRows = Params::kRows;
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

__device__ __forceinline__ float lowest() { return __int_as_float(static_cast<int>(0xff800000u)); }

// ---- rows of heads between device and shared memory ----------------------------------------------------------------

// What is done with a pack in shared memory and its place in the tensor, which is null where there is no such token or
// channel. (Not lambdas: NVRTC takes generic ones for host code.)
struct Take {  // it is there after `copies_done` and a barrier
  template <class T, int kPack>
  __device__ __forceinline__ void operator()(Pack<T, kPack>* to, const T* from) const {
    if (!from) {
      IRT_UNROLL
      for (int i = 0; i < kPack; ++i) from_float(0.0f, to->values[i]);
    } else if constexpr (kPack == 1) {
      to->values[0] = *from;
    } else {
      copy_later<sizeof *to>(to, from);
    }
  }
};
struct Give {
  template <class T, int kPack>
  __device__ __forceinline__ void operator()(const Pack<T, kPack>* from, T* to) const {
    if (to) store_pack(to, *from);
  }
};

// Tokens [first, first + rows) of a window in one head's channels, as rows in shared memory.
template <class T, int kChannels, class Move>
struct Rows {
  const Params& p;
  const Params::Tensor& tensor;
  const Windows::Window& window;
  int head, first, rows;
  unsigned char* shared;

  // Shared out among `threads` threads.
  __device__ __forceinline__ void move(int thread, int threads) const {
    switch (tensor.pack) {
      case 8:
        if constexpr (sizeof(T) == 2) packs<8>(thread, threads);
        break;
      case 4: packs<4>(thread, threads); break;
      case 2: packs<2>(thread, threads); break;
      default: packs<1>(thread, threads);
    }
  }

 private:
  template <int kPack>
  __device__ __forceinline__ void packs(int thread, int threads) const {
    constexpr int kOfRow = kChannels / kPack, kPitch = Params::pitch(sizeof(T), kChannels);
    IRT_ROLL
    for (int i = thread; i < rows * kOfRow; i += threads) {
      const int row = i / kOfRow, channel = i % kOfRow * kPack, token = first + row;
      T* global = nullptr;
      if (token < p.windows.tokens() && channel < p.channels) {
        const Windows::Place at = p.windows.place(window, token);
        global = static_cast<T*>(tensor.data) + window.image * tensor.strides[0] + at.row * tensor.strides[1] +
                 at.column * tensor.strides[2] +
                 (static_cast<long long>(head) * p.channels + channel) * tensor.strides[3];
      }
      Move()(reinterpret_cast<Pack<T, kPack>*>(shared + row * kPitch) + i % kOfRow, global);
    }
  }
};

// ---- a warp's 16 queries -------------------------------------------------------------------------------------------
//
// A lane has some rows of scores and of sums; `kSharers` lanes have the same rows, and the lanes that differ from one
// another in those lowest bits are they. `row`, `key` and `channel` say what is where.

template <class T, int kChannels>
struct Warp {  // on tensor cores
  static constexpr int kMine = 2, kScores = kKeys / 4, kSums = kChannels / 4, kSharers = 4;
  static constexpr int kPitch = Params::pitch(sizeof(T), kChannels);
  int lane, g, t;
  float scores[kMine][kScores], sums[kMine][kSums];

  __device__ __forceinline__ Warp(int lane, unsigned char*) : lane(lane), g(lane / 4), t(lane % 4) {}
  __device__ __forceinline__ int row(int i) const { return g + 8 * i; }
  __device__ __forceinline__ int key(int j) const { return j / 2 * 8 + 2 * t + j % 2; }
  __device__ __forceinline__ int channel(int c) const { return c / 2 * 8 + 2 * t + c % 2; }
  // A weight as it is multiplied.
  static __device__ __forceinline__ float rounded(float weight) {
    T value;
    from_float(weight, value);
    return to_float(value);
  }

  __device__ __forceinline__ void score(const unsigned char* queries, const unsigned char* keys) {
    float products[kKeys / 8][4] = {};
    IRT_UNROLL
    for (int k = 0; k < kChannels / 2; k += 8) {  // words
      const unsigned a[4] = {word(queries, g, k + t), word(queries, g + 8, k + t), word(queries, g, k + t + 4),
                             word(queries, g + 8, k + t + 4)};
      IRT_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) {
        const unsigned b[2] = {word(keys, 8 * n + g, k + t), word(keys, 8 * n + g, k + t + 4)};
        multiply_add(products[n], a, b, T());
      }
    }
    IRT_UNROLL
    for (int j = 0; j < kScores; ++j) {
      IRT_UNROLL
      for (int i = 0; i < kMine; ++i) scores[i][j] = products[j / 2][2 * i + j % 2];
    }
  }
  // Adds weights, which are in place of the scores, times values.
  __device__ __forceinline__ void add(const unsigned char* values) {
    const unsigned char* const mine = values + (lane / 8 % 2 * 8 + lane % 8) * kPitch + lane / 16 * 16;
    IRT_UNROLL
    for (int k = 0; k < kKeys; k += 16) {
      const int j = k / 4;
      const unsigned a[4] = {two(scores[0][j], scores[0][j + 1]), two(scores[1][j], scores[1][j + 1]),
                             two(scores[0][j + 2], scores[0][j + 3]), two(scores[1][j + 2], scores[1][j + 3])};
      IRT_UNROLL
      for (int c = 0; c < kSums; c += 4) {  // 16 channels
        unsigned columns[4];
        load_columns(columns, mine + k * kPitch + c / 4 * 32);
        IRT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const unsigned b[2] = {columns[2 * half], columns[2 * half + 1]};
          const int at = c + 2 * half;
          float sum[4] = {sums[0][at], sums[0][at + 1], sums[1][at], sums[1][at + 1]};
          multiply_add(sum, a, b, T());
          sums[0][at] = sum[0];
          sums[0][at + 1] = sum[1];
          sums[1][at] = sum[2];
          sums[1][at + 1] = sum[3];
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ unsigned word(const unsigned char* rows, int row, int at) {
    return *reinterpret_cast<const unsigned*>(rows + row * kPitch + 4 * at);
  }
  static __device__ __forceinline__ unsigned two(float low, float high) {
    Pack<T, 2> pack;
    from_float(low, pack.values[0]);
    from_float(high, pack.values[1]);
    unsigned word;
    memcpy(&word, &pack, sizeof word);
    return word;
  }
};

template <int kChannels>
struct Warp<float, kChannels> {  // by fused multiply-adds
  static constexpr int kMine = 4, kScores = kKeys / 8, kSums = kChannels / 8, kSharers = 8;
  static constexpr int kVector = kSums < 4 ? kSums : 4;  // sums of neighbouring channels
  static constexpr int kPitch = Params::pitch(sizeof(float), kChannels);
  static constexpr int kWeights = Params::weights_pitch(sizeof(float));
  int g, t;
  unsigned char* weights;  // of the warp, in shared memory
  float scores[kMine][kScores], sums[kMine][kSums];

  __device__ __forceinline__ Warp(int lane, unsigned char* weights) : g(lane / 8), t(lane % 8), weights(weights) {}
  __device__ __forceinline__ int row(int i) const { return 4 * g + i; }
  __device__ __forceinline__ int key(int j) const { return 8 * j + t; }
  __device__ __forceinline__ int channel(int c) const { return (c / kVector * 8 + t) * kVector + c % kVector; }
  static __device__ __forceinline__ float rounded(float weight) { return weight; }

  __device__ __forceinline__ void score(const unsigned char* queries, const unsigned char* keys) {
    IRT_UNROLL
    for (int i = 0; i < kMine; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kScores; ++j) scores[i][j] = 0.0f;
    }
    IRT_ROLL
    for (int c = 0; c < kChannels; c += 4) {
      Pack<float, 4> q[kMine];
      IRT_UNROLL
      for (int i = 0; i < kMine; ++i) q[i] = pack<4>(queries, row(i) * kPitch, c);
      IRT_UNROLL
      for (int j = 0; j < kScores; ++j) {
        const Pack<float, 4> k = pack<4>(keys, key(j) * kPitch, c);
        IRT_UNROLL
        for (int i = 0; i < kMine; ++i) {
          IRT_UNROLL
          for (int v = 0; v < 4; ++v) scores[i][j] += q[i].values[v] * k.values[v];
        }
      }
    }
  }
  __device__ __forceinline__ void add(const unsigned char* values) {
    IRT_UNROLL
    for (int i = 0; i < kMine; ++i) {
      IRT_UNROLL
      for (int j = 0; j < kScores; ++j)
        *reinterpret_cast<float*>(weights + row(i) * kWeights + 4 * key(j)) = scores[i][j];
    }
    __syncwarp();
    IRT_ROLL
    for (int k = 0; k < kKeys; k += 4) {
      Pack<float, 4> w[kMine];
      IRT_UNROLL
      for (int i = 0; i < kMine; ++i) w[i] = pack<4>(weights, row(i) * kWeights, k);
      IRT_UNROLL
      for (int n = 0; n < 4; ++n) {
        IRT_UNROLL
        for (int c = 0; c < kSums; c += kVector) {
          const Pack<float, kVector> value = pack<kVector>(values, (k + n) * kPitch, channel(c));
          IRT_UNROLL
          for (int i = 0; i < kMine; ++i) {
            IRT_UNROLL
            for (int v = 0; v < kVector; ++v) sums[i][c + v] += w[i].values[n] * value.values[v];
          }
        }
      }
    }
    __syncwarp();
  }

 private:
  template <int n>
  static __device__ __forceinline__ Pack<float, n> pack(const unsigned char* rows, int row, int column) {
    return load_pack<n>(reinterpret_cast<const float*>(rows + row) + column);
  }
};

// ---- softmax -------------------------------------------------------------------------------------------------------

// e^x, times 2²⁰ where the type has room for it (see the top).
template <class T>
struct Weight {
  static __device__ __forceinline__ float of(float x) {
    const float root = 1024.0f * Math<T>::exp(0.5f * x);
    return root * root;
  }
};
template <>
struct Weight<__half> {
  static __device__ __forceinline__ float of(float x) { return Math<__half>::exp(x); }
};

// Over the lanes that have the same rows.
template <int kSharers>
__device__ __forceinline__ float most_of(float x) {
  IRT_UNROLL
  for (int lanes = 1; lanes < kSharers; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lanes));
  return x;
}
template <int kSharers>
__device__ __forceinline__ float sum_of(float x) {
  IRT_UNROLL
  for (int lanes = 1; lanes < kSharers; lanes *= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

// An element of a mask or a bias.
template <class T>
__device__ __forceinline__ float element(const void* data, long long at, bool wide) {
  return wide ? static_cast<const float*>(data)[at] : to_float(static_cast<const T*>(data)[at]);
}

template <class T>
__device__ __forceinline__ float added_by_mask(const Params& p, const Windows::Window& window,
                                               const Windows::Place& at) {
  const Params::Mask& mask = p.mask;
  const float valid = element<T>(
      mask.data, window.image * mask.strides[0] + at.row * mask.strides[1] + at.column * mask.strides[2], mask.wide);
  return valid == 1.0f ? 0.0f : valid == 0.0f ? p.mask_value : valid;
}

// kChannels: those of a head and what fills them up to 16, 32 or 64.
template <class T, int kChannels, bool kBias>
__device__ __forceinline__ void attend(const Params& p) {
  using Mine = Warp<T, kChannels>;
  constexpr int kPitch = Params::pitch(sizeof(T), kChannels);
  constexpr int kWeights = kRows * Params::weights_pitch(sizeof(T));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, warps = static_cast<int>(blockDim.x) / 32;
  unsigned char* const queries = window_memory();
  unsigned char* const keys = queries + warps * kRows * kPitch;
  unsigned char* const values = keys + kKeys * kPitch;
  unsigned char* const weights = values + kKeys * kPitch;
  Params::Key* const known = reinterpret_cast<Params::Key*>(weights + warps * kWeights);

  const int block = static_cast<int>(blockIdx.x), pair = p.blocks.quotient(block), index = p.heads.quotient(pair);
  const int head = pair - index * p.heads.value, first_query = (block - pair * p.blocks.value) * warps * kRows;
  const Windows::Window here = p.windows.window(index);
  const int tokens = p.windows.tokens();

  Mine mine(thread % 32, weights + warp * kWeights);
  int region[Mine::kMine];
  float most[Mine::kMine], total[Mine::kMine];  // the latter over the lane's own keys
  IRT_UNROLL
  for (int i = 0; i < Mine::kMine; ++i) {
    region[i] = p.windows.place(here, first_query + warp * kRows + mine.row(i)).region;
    most[i] = lowest();
    total[i] = 0.0f;
    IRT_UNROLL
    for (int c = 0; c < Mine::kSums; ++c) mine.sums[i][c] = 0.0f;
  }

  const int threads = static_cast<int>(blockDim.x);
  Rows<T, kChannels, Take>{p, p.q, here, head, first_query, warps * kRows, queries}.move(thread, threads);
  IRT_ROLL
  for (int first = 0; first < tokens; first += kKeys) {
    if (first > 0) __syncthreads();
    Rows<T, kChannels, Take>{p, p.k, here, head, first, kKeys, keys}.move(thread, threads);
    Rows<T, kChannels, Take>{p, p.v, here, head, first, kKeys, values}.move(thread, threads);
    for (int j = thread; j < kKeys; j += threads) {
      if (first + j >= tokens) continue;
      const Windows::Place at = p.windows.place(here, first + j);
      known[j] = {p.mask.data ? added_by_mask<T>(p, here, at) : 0.0f, at.region};
    }
    copies_done();
    __syncthreads();

    mine.score(queries + warp * kRows * kPitch, keys);
    float highest[Mine::kMine];
    IRT_UNROLL
    for (int i = 0; i < Mine::kMine; ++i) highest[i] = most[i];
    IRT_UNROLL
    for (int j = 0; j < Mine::kScores; ++j) {
      const bool exists = first + mine.key(j) < tokens;
      const Params::Key key = exists ? known[mine.key(j)] : Params::Key{};
      IRT_UNROLL
      for (int i = 0; i < Mine::kMine; ++i) {
        float& logit = mine.scores[i][j];
        logit *= p.scale;
        if constexpr (kBias) {
          const int query = first_query + warp * kRows + mine.row(i);
          const long long at =
              head * p.bias.strides[0] + query * p.bias.strides[1] + (first + mine.key(j)) * p.bias.strides[2];
          if (exists && query < tokens) logit += element<T>(p.bias.data, at, p.bias.wide);
        }
        logit += region[i] == key.region ? 0.0f : p.mask_value;
        logit = exists ? logit + key.added : lowest();
        highest[i] = fmaxf(highest[i], logit);
      }
    }
    IRT_UNROLL
    for (int i = 0; i < Mine::kMine; ++i) {
      const float last = most[i];
      most[i] = most_of<Mine::kSharers>(highest[i]);
      const float base = most[i] == lowest() ? 0.0f : most[i];  // −∞ − (−∞) would be no number
      const float kept = Math<T>::exp(0.5f * (last - base));    // its square may be too small a number
      float sum = 0.0f;
      IRT_UNROLL
      for (int j = 0; j < Mine::kScores; ++j) {
        float& score = mine.scores[i][j];
        score = Mine::rounded(Weight<T>::of(score - base));
        sum += score;
      }
      total[i] = total[i] * kept * kept + sum;
      IRT_UNROLL
      for (int c = 0; c < Mine::kSums; ++c) mine.sums[i][c] = mine.sums[i][c] * kept * kept;
    }
    mine.add(values);
  }

  // Through shared memory, in place of the warp's own queries, to the order in which the output lies.
  unsigned char* const stage = queries + warp * kRows * kPitch;
  __syncwarp();
  IRT_UNROLL
  for (int i = 0; i < Mine::kMine; ++i) {
    const float sum = sum_of<Mine::kSharers>(total[i]);
    T* const row = reinterpret_cast<T*>(stage + mine.row(i) * kPitch);
    IRT_UNROLL
    for (int c = 0; c < Mine::kSums; ++c) from_float(mine.sums[i][c] / sum, row[mine.channel(c)]);
  }
  __syncwarp();
  Rows<T, kChannels, Give>{p, p.out, here, head, first_query + warp * kRows, kRows, stage}.move(thread % 32, 32);
}

}  // namespace window

// A biased block keeps 32 of its bias's elements at a time in registers besides the scores.
template <class T, int kChannels>
__global__ void __launch_bounds__(WindowAttention::kThreads, 4)
    window_attention(const __grid_constant__ WindowAttention p) {
  window::attend<T, kChannels, false>(p);
}
template <class T, int kChannels>
__global__ void __launch_bounds__(WindowAttention::kThreads, 2)
    window_attention_biased(const __grid_constant__ WindowAttention p) {
  window::attend<T, kChannels, true>(p);
}

}  // namespace irt
