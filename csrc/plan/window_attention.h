// What the kernel of window_attention is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "windows.h"

namespace irt {

// A block takes some queries of one window and head, 16 a warp, and all keys of the window, 64 at a time.
struct WindowAttention {
  static constexpr int kRows = 16;  // queries of a warp
  static constexpr int kWarps = 4;  // of a block, at most
  static constexpr int kKeys = 64;  // in shared memory at a time
  static constexpr int kMost = 64;  // channels of a head
  static constexpr int kThreads = 32 * kWarps;

  struct Tensor {
    void* data;
    long long strides[4];  // of image, row, column, channel in elements
    int pack;              // elements of a token and head that may be moved at once; 1: of any stride
  };
  struct Mask {
    const void* data;      // null: none
    long long strides[3];  // of image, row, column; 0 where one image serves all
    bool wide;             // float32 whatever the tensors are
  };
  struct Bias {
    const void* data;      // null: none
    long long strides[3];  // of head, query, key
    bool wide;
  };
  struct Key {
    float added;  // by the mask
    int region;
  };

  // Shared memory: rows of queries, keys and values, with 16 bytes behind each, which keep neighbouring rows out of
  // each other's banks; float32 weights, a row per query; then what is known of the keys.
  IRT_BOTH static constexpr int pitch(int bytes, int channels) { return bytes * channels + 16; }
  IRT_BOTH static constexpr int weights_pitch(int bytes) { return bytes == 4 ? 4 * kKeys + 16 : 0; }
  IRT_BOTH static constexpr int shared_bytes(int bytes, int channels, int warps) {
    return (kRows * warps + 2 * kKeys) * pitch(bytes, channels) + kRows * warps * weights_pitch(bytes) +
           kKeys * static_cast<int>(sizeof(Key));
  }

  Windows windows;
  Tensor q, k, v, out;
  Mask mask;
  Bias bias;
  Divisor<int> heads, blocks;  // blocks of queries of a window and head
  int channels;                // of a head
  float scale, mask_value;
};

}  // namespace irt
