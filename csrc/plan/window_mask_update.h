// What the kernel of window_mask_update is given. Read by the planner (host C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "windows.h"

namespace irt {

// A warp per window.
struct WindowMaskUpdate {
  static constexpr int kThreads = 128;

  struct Mask {
    void* data;
    long long strides[3];  // of image, row, column in elements
  };
  Windows windows;
  Mask mask, out;
  int count;  // of windows
};

}  // namespace irt
