// The CUDA library's exports, and how a plan is launched. Linked with a static CUDA runtime, which loads the driver at
// the first call: the library loads on a machine without one, and says what is missing when it is used there.
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

const Instance* find(const Instance* instances, size_t count, const irt_launch& launch, bool workspace, bool round) {
  for (size_t i = 0; i < count; ++i) {
    const Instance& have = instances[i];
    if (strcmp(have.entry, launch.entry)) continue;
    const bool fits = have.params_bytes == launch.params_bytes && have.workspace == workspace && have.round == round;
    return fits ? &have : nullptr;
  }
  return nullptr;
}

cudaError_t launch_one(const void* kernel, const irt_launch& launch, void* workspace, int round, cudaStream_t stream) {
  if (launch.shared_bytes > kPlainShared) {
    const auto bytes = static_cast<int>(launch.shared_bytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  void* params[] = {const_cast<unsigned char*>(launch.params), &workspace,
                    &round};  // read up to the kernel's own number
  const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  const dim3 block(launch.block[0], launch.block[1], launch.block[2]);
  return cudaLaunchKernel(kernel, grid, block, params, launch.shared_bytes, stream);
}

}  // namespace

void launch(const Instance* instances, size_t count, const irt_call& call, const irt_plan& plan, void* workspace,
            irt_status& status) {
  status.code = IRT_OK;
  status.message[0] = 0;
  const Instance* found[IRT_MAX_LAUNCHES];
  const int repeated = plan.rounds ? plan.first_repeated : plan.count;
  for (int i = 0; i < plan.count; ++i) {
    found[i] = find(instances, count, plan.launches[i], plan.workspace_bytes > 0, i >= repeated);
    if (found[i]) continue;  // else a plan and an instance list disagree: a fault of the build, which a test looks for
    status.code = IRT_UNSUPPORTED;
    snprintf(status.message, sizeof status.message, "the CUDA library has no instance %s", plan.launches[i].entry);
    return;
  }
  if (!plan.count) return;
  const Device device(call.device);
  if (device.error != cudaSuccess) return refuse(status, device.error, plan.launches[0].entry);
  const auto launch_range = [&](int begin, int end, int round) {
    const auto stream = static_cast<cudaStream_t>(call.stream);
    for (int i = begin; i < end; ++i) {
      const cudaError_t error = launch_one(found[i]->kernel, plan.launches[i], workspace, round, stream);
      if (error == cudaSuccess) continue;
      refuse(status, error, plan.launches[i].entry);
      return false;
    }
    return true;
  };
  bool fine = launch_range(0, repeated, 0);
  for (int round = 0; fine && round < plan.rounds; ++round) fine = launch_range(repeated, plan.count, round);
}

}  // namespace irt::cuda

#define IRT_EXPORT extern "C" __attribute__((visibility("default")))

// The planner of op `name`, or null.
IRT_EXPORT irt_planner irt_plan_find(const char* name) {
  for (auto p = __start_irt_plans; p != __stop_irt_plans; ++p) {
    if (!strcmp((*p)->name, name)) return (*p)->plan;
  }
  return nullptr;
}

// What launches the plans of op `name`, or null.
IRT_EXPORT irt_launcher irt_cuda_find(const char* name) {
  for (auto k = __start_irt_cuda_kernels; k != __stop_irt_cuda_kernels; ++k) {
    if (!strcmp((*k)->name, name)) return (*k)->launch;
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
