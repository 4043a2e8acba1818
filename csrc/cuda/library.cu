// The CUDA library's exports and its one launcher. Linked with a static CUDA runtime, which loads the driver at the
// first call: the library loads on a machine without one, and says what is missing when it is used there.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "cuda/launch.h"

#define IRT_STRING2(x) #x
#define IRT_STRING(x) IRT_STRING2(x)
#define IRT_NVCC \
  IRT_STRING(__CUDACC_VER_MAJOR__) "." IRT_STRING(__CUDACC_VER_MINOR__) "." IRT_STRING(__CUDACC_VER_BUILD__)

// Bounds of the linker sections that kernel and plan files fill.
extern "C" {
extern const irt::cuda::Record* const __start_irt_cuda_kernels[] __attribute__((visibility("hidden")));
extern const irt::cuda::Record* const __stop_irt_cuda_kernels[] __attribute__((visibility("hidden")));
extern const irt::PlanRecord* const __start_irt_plans[] __attribute__((visibility("hidden")));
extern const irt::PlanRecord* const __stop_irt_plans[] __attribute__((visibility("hidden")));
}

namespace irt::cuda {
namespace {

constexpr uint32_t kPlainShared = 48 * 1024;  // what a kernel may use without asking
constexpr int kOldestDriver = CUDART_VERSION >= 13000 ? 580 : 525;

void refuse(irt_status& status, cudaError_t error, const char* entry) {
  status.code = IRT_DEVICE_ERROR;
  char* const text = status.message;
  const size_t size = sizeof status.message;
  if (error == cudaErrorInsufficientDriver) {
    snprintf(text, size,
             "no CUDA driver, or one too old (CUDA error 35): these kernels were built by nvcc " IRT_NVCC
             " and need driver >= %d; the extras cuda12 and cuda13 (CuPy) serve others",
             kOldestDriver);
  } else if (error == cudaErrorNoKernelImageForDevice) {
    snprintf(text, size,
             "the CUDA library was built for sm " INPAINTRT_CUDA_ARCH_LIST
             ", not for this GPU (CUDA error 209): rebuild with INPAINTRT_CUDA_ARCHS");
  } else {
    snprintf(text, size, "CUDA error %d (%s) launching %s", static_cast<int>(error), cudaGetErrorString(error), entry);
  }
  cudaGetLastError();  // this error is reported here; the next call must not find it again
}

// The call's device while this lives, then the one there was before.
class Device {
 public:
  explicit Device(int wanted) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && wanted != before_) {
      error = cudaSetDevice(wanted);
      changed_ = error == cudaSuccess;
    }
  }
  ~Device() {
    if (changed_) cudaSetDevice(before_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

const Instance* find(const Instance* instances, size_t count, const irt_plan& plan) {
  for (size_t i = 0; i < count; ++i) {
    if (!strcmp(instances[i].entry, plan.entry) && instances[i].params_bytes == plan.params_bytes) return &instances[i];
  }
  return nullptr;
}

}  // namespace

void launch(irt_planner plan, const Instance* instances, size_t count, const irt_call& call, irt_status& status) {
  irt_plan p{};
  plan(&call, &p, &status);
  if (status.code != IRT_OK || !p.grid[0] || !p.grid[1] || !p.grid[2]) return;
  const Instance* found = find(instances, count, p);
  if (!found) {  // a plan and an instance list that disagree: a fault of the build, which a test looks for
    status.code = IRT_UNSUPPORTED;
    snprintf(status.message, sizeof status.message, "the CUDA library has no instance %s", p.entry);
    return;
  }
  const Device device(call.device);
  if (device.error != cudaSuccess) return refuse(status, device.error, p.entry);
  if (p.shared_bytes > kPlainShared) {
    const int bytes = static_cast<int>(p.shared_bytes);
    const cudaError_t error = cudaFuncSetAttribute(found->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return refuse(status, error, p.entry);
  }
  void* params[] = {p.params};
  const dim3 grid(p.grid[0], p.grid[1], p.grid[2]), block(p.block[0], p.block[1], p.block[2]);
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const cudaError_t error = cudaLaunchKernel(found->kernel, grid, block, params, p.shared_bytes, stream);
  if (error != cudaSuccess) refuse(status, error, p.entry);
}

}  // namespace irt::cuda

irt_planner irt_plan_find(const char* name) {
  for (auto p = __start_irt_plans; p != __stop_irt_plans; ++p) {
    if (!strcmp((*p)->name, name)) return (*p)->plan;
  }
  return nullptr;
}

#define IRT_EXPORT extern "C" __attribute__((visibility("default")))

// The kernel of op `name`, or null.
IRT_EXPORT irt_kernel irt_cuda_find(const char* name) {
  for (auto k = __start_irt_cuda_kernels; k != __stop_irt_cuda_kernels; ++k) {
    if (!strcmp((*k)->name, name)) return (*k)->run;
  }
  return nullptr;
}

// As JSON: what the library was built by and for, and the CUDA version of the driver found now (0: none). Starts no
// CUDA.
IRT_EXPORT const char* irt_cuda_info() {
  static char text[256];
  int driver = 0;
  cudaDriverGetVersion(&driver);
  snprintf(text, sizeof text,
           "{\"nvcc\": \"" IRT_NVCC "\", \"archs\": [" INPAINTRT_CUDA_ARCH_LIST
           "], \"ptx\": %d, \"runtime\": %d, "
           "\"oldest_driver\": %d, \"driver\": %d}",
           INPAINTRT_CUDA_PTX, CUDART_VERSION, irt::cuda::kOldestDriver, driver);
  return text;
}
