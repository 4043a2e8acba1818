// What a launch plan file includes: registration, argument access, and the way from strides to a `Nest`.
//
// Plans are host C++ without CUDA: compiled once into the Python extension (for CuPy, and to be tested without a GPU)
// and once into the CUDA library. The tools are the CPU kernels' own, in a namespace of their own at baseline flags.
#pragma once

#define INPAINTRT_ISA plan
#include <cassert>
#include <cstddef>
#include <type_traits>

#include "activation.h"
#include "kernel.h"
#include "loop.h"
#include "nest.h"

// Registers `void name(const irt_call&, irt_plan&, irt_status&)` under its own name.
#define IRT_PLAN(name)                                                                \
  static void name##_entry(const irt_call* call, irt_plan* out, irt_status* status) { \
    clear(*out);                                                                      \
    if (well_formed(*call, *status)) name(*call, *out, *status);                      \
    if (status->code != IRT_OK) clear(*out);                                          \
  }                                                                                   \
  static const ::irt::PlanRecord name##_record = {#name, name##_entry};               \
  __attribute__((section("irt_plans"), used)) static const ::irt::PlanRecord* const name##_listed = &name##_record;

namespace irt::plan {

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's first dimension
constexpr int64_t kNarrow = int64_t{1} << 31;

// The C++ name of a dtype's storage type, and 0 or the number of elements in 16 bytes.
struct Storage {
  const char* name;
  int per_vector;
};
static inline Storage storage(int dtype) {
  switch (dtype) {
    case IRT_F32: return {"float", 4};
    case IRT_F16: return {"__half", 8};
    case IRT_BF16: return {"__nv_bfloat16", 8};
    default: return {"", 0};
  }
}

// One more than the largest offset, in elements, that the nest reaches in operand k.
template <int kOperands>
int64_t extent(const Loop<kOperands>& loop, int k) {
  int64_t last = 0;
  for (int d = 0; d < loop.ndim; ++d) last += (loop.sizes[d] - 1) * loop.strides[k][d];
  return last + 1;
}

// Whether the innermost dimension can be walked in packs of `n` elements at addresses that n elements' size divides.
// Pointers are the caller's to check (`aligned`), since several may share an operand's strides.
template <int kOperands>
bool packable(const Loop<kOperands>& loop, int n) {
  const int last = loop.ndim - 1;
  if (loop.sizes[last] % n) return false;
  for (int k = 0; k < kOperands; ++k) {
    if (loop.strides[k][last] != 1) return false;
    for (int d = 0; d < last; ++d) {
      if (loop.strides[k][d] % n) return false;
    }
  }
  return true;
}
static inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The loop as the kernel walks it: innermost first, an index per pack of `pack` elements.
template <class Offset, int kOperands>
Nest<Offset, kOperands> nest(const Loop<kOperands>& loop, int pack) {
  using Result = Nest<Offset, kOperands>;
  Result result{};
  result.rank = loop.ndim;
  for (int d = 0; d < loop.ndim; ++d) {
    const int from = loop.ndim - 1 - d, scale = d == 0 ? pack : 1;
    result.sizes[d] = Divisor<Offset>::of(static_cast<Offset>(loop.sizes[from] / scale));
    for (int k = 0; k < kOperands; ++k) result.strides[k][d] = static_cast<Offset>(loop.strides[k][from] * scale);
  }
  return result;
}

// No launches. What the array of launches holds stays as it is: nobody reads beyond `count`.
static inline void clear(irt_plan& plan) {
  plan.workspace_bytes = 0;
  plan.count = plan.first_repeated = plan.rounds = 0;
}

// Appends a launch of whole blocks over `count` > 0 threads in one dimension, which still lacks its entry and its
// parameters; null, with a status, where no grid is large enough.
static inline irt_launch* add_launch(irt_plan& plan, int64_t count, int threads, irt_status& status) {
  const int64_t blocks = (count + threads - 1) / threads;
  if (blocks > kMaxBlocks) {
    fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
    return nullptr;
  }
  assert(plan.count < IRT_MAX_LAUNCHES);
  irt_launch& launch = plan.launches[plan.count++];
  launch.entry[0] = 0;
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.block[0] = static_cast<uint32_t>(threads);
  launch.grid[1] = launch.grid[2] = launch.block[1] = launch.block[2] = 1;
  launch.shared_bytes = launch.params_bytes = 0;
  return &launch;
}

template <class Params>
void set_params(irt_launch& launch, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= sizeof launch.params);
  memcpy(launch.params, &params, sizeof params);
  launch.params_bytes = sizeof params;
}

}  // namespace irt::plan
