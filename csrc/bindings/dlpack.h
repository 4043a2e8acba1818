// The part of the DLPack C exchange protocol that reads a tensor without owning it, which torch publishes as a table,
// `torch.Tensor.__dlpack_c_exchange_api__` (torch 2.11 on); and what hands memory over to torch. Declared here from the
// published ABI, so that the library needs no torch headers and one build serves every torch.
#pragma once

#include <cstdint>

namespace irt::dlpack {

constexpr int kCpu = 1, kCuda = 2, kCudaHost = 3;

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python error set
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

struct ManagedTensor {  // in a capsule called kManaged, until somebody takes it
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

constexpr uint32_t kMajor = 1;
constexpr const char* kManaged = "dltensor";
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace irt::dlpack
