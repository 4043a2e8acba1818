// What the kernel of upfirdn2d is given: a `Resample` without noise, bias and activation. Read by the planner (host
// C++) and the kernel (nvcc and NVRTC).
#pragma once

#include "resample.h"
