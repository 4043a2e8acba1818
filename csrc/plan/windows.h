// Windows of a map that may be shifted: where their tokens lie. Read by planners (host C++) and kernels (nvcc and
// NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// Windows are counted row by row, image by image, on the map rolled by −shift; so are the tokens of a window.
struct Windows {
  int height, width, shift;
  Divisor<int> size, down, across;  // side of a window; windows in a column and in a row

  struct Window {
    int image, top, left;  // on the rolled map
  };
  struct Place {
    int row, column;  // on the map
    int region;       // tokens of a window with equal numbers are neighbours on the map as it was
  };

  IRT_BOTH int tokens() const { return size.value * size.value; }
  IRT_BOTH Window window(int index) const {
    const int row = across.quotient(index), image = down.quotient(row);
    return {image, (row - image * down.value) * size.value, (index - row * across.value) * size.value};
  }
  IRT_BOTH Place place(const Window& window, int token) const {
    const int y = size.quotient(token), row = window.top + y, column = window.left + token - y * size.value;
    const int below = row >= height - shift, beyond = column >= width - shift;  // come from the map's beginning
    return {row + shift - (below ? height : 0), column + shift - (beyond ? width : 0), 2 * below + beyond};
  }
};

}  // namespace irt
