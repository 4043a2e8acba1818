// Arithmetic on sizes that kernels share.
#pragma once

#include <cstdint>

#include "simd.h"

namespace irt::INPAINTRT_ISA {

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
static inline int64_t vectors(int64_t floats) { return ceil_div(floats, 16) * 16; }  // to the next cache line

}  // namespace irt::INPAINTRT_ISA
