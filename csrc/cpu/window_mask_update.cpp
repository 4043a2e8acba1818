// window_mask_update on the CPU: the sum of each window of a mask, clamped to [0, 1], for all of its tokens.
#include <cmath>

#include "kernel.h"
#include "parallel.h"
#include "simd.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t kGrain = 4096;  // tokens a thread is worth waking for

template <class T>
void run(const irt_view& mask, const irt_view& out, int64_t size, int64_t shift, int threads) {
  const int64_t height = mask.sizes[1], width = mask.sizes[2], down = height / size, across = width / size;
  const auto* from = static_cast<const T*>(mask.data);
  auto* to = static_cast<T*>(out.data);
  const int64_t grain = kGrain / (size * size) + 1;
  parallel_for(mask.sizes[0] * down * across, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (down * across), top = i / across % down * size + shift, left = i % across * size + shift;
      const auto each = [&](const int64_t* strides, auto visit) {
        for (int64_t y = 0; y < size; ++y) {
          const int64_t row = b * strides[0] + (top + y) % height * strides[1];
          for (int64_t x = 0; x < size; ++x) visit(row + (left + x) % width * strides[2]);
        }
      };
      double sum = 0.0;
      each(mask.strides, [&](int64_t at) { sum += static_cast<double>(to_float(from[at])); });
      T updated;
      from_float(static_cast<float>(sum < 0.0 ? 0.0 : sum > 1.0 ? 1.0 : sum), updated);  // NaN stays
      each(out.strides, [&](int64_t at) { to[at] = updated; });
    }
  });
}

// (mask, window_size, shift) -> out
void window_mask_update(const irt_call& call, irt_status& status) {
  bool good = call.nargs == 3 && call.nouts == 1 && call.args[0].kind == IRT_TENSOR && call.args[1].kind == IRT_INT &&
              call.args[2].kind == IRT_INT;
  if (good) {
    const irt_view &x = *call.args[0].tensors, &out = call.outs[0];
    const int64_t size = call.args[1].i, shift = call.args[2].i;
    good = x.ndim == 4 && out.ndim == 4 && x.dtype == out.dtype && !memcmp(x.sizes, out.sizes, 4 * sizeof x.sizes[0]) &&
           size > 0 && shift >= 0 && shift < size && x.sizes[1] > 0 && x.sizes[2] > 0 && x.sizes[3] == 1 &&
           x.sizes[1] % size == 0 && x.sizes[2] % size == 0;
  }
  if (!good) {
    return fail(status, IRT_BAD_ARGUMENT,
                "expected (mask, window_size, shift) and one output, both (B, H, W, 1) of one dtype, which the window "
                "divides");
  }
  const irt_view &x = *call.args[0].tensors, &out = call.outs[0];
  const int64_t size = call.args[1].i, shift = call.args[2].i;
  switch (x.dtype) {
    case IRT_F32: return run<float>(x, out, size, shift, call.threads);
    case IRT_BF16: return run<bf16>(x, out, size, shift, call.threads);
    case IRT_F16: return run<f16>(x, out, size, shift, call.threads);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(window_mask_update)

}  // namespace irt::INPAINTRT_ISA
