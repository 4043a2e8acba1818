// What the kernels of nearest_code are given. Read by the planner (host C++) and the kernels (nvcc and NVRTC).
#pragma once

namespace irt {

// A block compares kVectors vectors with the codes of a chunk, kCodes at a time. The workspace: what each chunk found,
// (chunks, vectors).
struct NearestCode {
  static constexpr int kThreads = 256, kVectors = 64, kCodes = 64, kDepth = 16;
  static constexpr int kEach = 4;  // vectors and codes of a thread

  // What is nearest so far, and at what distance.
  struct Found {
    float distance;
    int code;
  };
  // Shared memory of the kernel.
  struct Memory {
    float x[kDepth][kVectors + kEach], codes[kDepth][kCodes + kEach];
    float x_squares[kVectors], code_squares[kCodes];
    int known[kVectors];
  };

  const void *x, *codebook;
  const void* known;  // of x's dtype or bytes; null: one half
  long long x_strides[2], code_strides[2], known_stride;
  int vectors, codes, depth, split;
  int blocks, chunk;  // blocks of vectors; codes of a chunk, a multiple of kCodes
  bool bytes;         // what `known` is made of
};

// What all chunks found.
struct NearestCodeFirst {
  static constexpr int kThreads = 128;

  long long* out;
  int vectors, chunks;
};

}  // namespace irt
