// upfirdn2d on the GPU: zeros between the samples, padding, a FIR filter and decimation as index arithmetic
// (resample.cuh).
#pragma once

#include "plan/upfirdn2d.h"
#include "resample.cuh"

namespace irt {

template <class T, int kPack>
__global__ void __launch_bounds__(Resample::kThreads) upfirdn2d(const __grid_constant__ Resample p) {
  resample<T, kPack>(p, p.image.data, p.out);
}

}  // namespace irt
