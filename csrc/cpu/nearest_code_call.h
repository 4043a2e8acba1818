// The call of nearest_code, read and checked: for the CPU kernel and the launch plan alike.
#pragma once

#include "kernel.h"

namespace irt::INPAINTRT_ISA {

// (x, codebook, split, known) -> out
struct NearestCodeCall {
  static constexpr int64_t kMostCodes = 1 << 24;

  const irt_view *x, *codebook, *out;
  const irt_view* known;  // null: one half, and split is the number of codes
  int64_t split;

  // The dtype of x is the caller's to check.
  bool read(const irt_call& call, irt_status& status) {
    if (fits(call)) return true;
    fail(status, IRT_BAD_ARGUMENT,
         "expected (x (N, D), codebook (K, D), split, known (N)) with split and known both or neither, K at most "
         "2^24, and one output, contiguous int64 (N)");
    return false;
  }

 private:
  bool fits(const irt_call& call) {
    if (call.nargs != 4 || call.nouts != 1 || call.args[0].kind != IRT_TENSOR || call.args[1].kind != IRT_TENSOR) {
      return false;
    }
    x = call.args[0].tensors, codebook = call.args[1].tensors, out = call.outs;
    const irt_value &given = call.args[2], &kind = call.args[3];
    if (x->ndim != 2 || codebook->ndim != 2 || x->dtype != codebook->dtype || x->sizes[1] != codebook->sizes[1] ||
        x->sizes[1] < 1 || codebook->sizes[0] < 1 || codebook->sizes[0] > kMostCodes || out->ndim != 1 ||
        out->dtype != IRT_I64 || out->sizes[0] != x->sizes[0] || (out->sizes[0] > 1 && out->strides[0] != 1)) {
      return false;
    }
    known = nullptr, split = codebook->sizes[0];
    if (given.kind == IRT_NONE && kind.kind == IRT_NONE) return true;
    if (given.kind != IRT_INT || kind.kind != IRT_TENSOR) return false;
    known = kind.tensors, split = given.i;
    return split > 0 && split < codebook->sizes[0] && known->ndim == 1 && known->sizes[0] == x->sizes[0] &&
           (known->dtype == IRT_BOOL || known->dtype == x->dtype);
  }
};

}  // namespace irt::INPAINTRT_ISA
