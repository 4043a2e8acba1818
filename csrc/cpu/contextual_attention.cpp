// contextual_attention on the CPU: what is asked for, and whether there is a kernel; see contextual_attention.h.
#include "contextual_attention.h"

namespace irt::INPAINTRT_ISA {

// (foreground, background, mask | none, patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps,
// mask_mode,
//  divisor, queries | none) -> out[, offsets]
void contextual::attend(const irt_call& call, bool with_offsets, irt_status& status) {
  Call c{};
  if (const char* fault = read(call, with_offsets, c)) return fail(status, IRT_BAD_ARGUMENT, fault);
  if (!covered(call)) {
    return fail(status, IRT_UNSUPPORTED, "only patch_size 3, rate 2 and fuse_size 3, 1 or 0 have a kernel");
  }
  const int dtype = c.foreground->dtype;
  if (dtype != IRT_F32 && dtype != IRT_BF16 && dtype != IRT_F16) {
    return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
  if (c.batch == 0) return;
  if (static_cast<double>(c.cells()) * static_cast<double>(c.channels) > 0x1p36) {
    return fail(status, IRT_OUT_OF_MEMORY, "no memory for a workspace of that size");
  }
  const Geometry g(c);
  const Workspace space(static_cast<size_t>(g.floats()) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  Attention(c, g, static_cast<float*>(space.data())).run();
}

static void contextual_attention(const irt_call& call, irt_status& status) { contextual::attend(call, false, status); }

IRT_CPU_KERNEL(contextual_attention)

}  // namespace irt::INPAINTRT_ISA
