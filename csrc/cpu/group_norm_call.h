// The call of group_norm_silu, read and checked: for the CPU kernel and the launch plan alike.
#pragma once

#include "activation.h"
#include "kernel.h"

namespace irt::INPAINTRT_ISA {

// (x, num_groups, weight, bias, scale, shift, eps, activation, second) -> out
struct GroupNormCall {
  const irt_view *x, *second, *out;  // second may be null
  const irt_view *weight, *bias;     // (C,); null: absent
  const irt_view *scale, *shift;     // (B, C); likewise
  int64_t groups;
  double eps;
  Act act;

  // The dtype is the caller's to check.
  bool read(const irt_call& call, irt_status& status) {
    if (fits(call)) return true;
    fail(status, IRT_BAD_ARGUMENT,
         "expected (x, num_groups, weight, bias, scale, shift, eps, activation, second) and one output: tensors "
         "(B, C, H, W), vectors (C,) and (B, C), activation \"silu\" or \"none\"");
    return false;
  }

 private:
  bool fits(const irt_call& call) {
    if (call.nargs != 9 || call.nouts != 1) return false;
    const irt_value* args = call.args;
    if (args[0].kind != IRT_TENSOR || args[1].kind != IRT_INT || !is_number_or_none(args[6]) ||
        args[7].kind != IRT_STRING || (args[8].kind != IRT_NONE && args[8].kind != IRT_TENSOR)) {
      return false;
    }
    x = args[0].tensors;
    second = args[8].kind == IRT_TENSOR ? args[8].tensors : nullptr;
    out = call.outs;
    groups = args[1].i;
    eps = float_arg(args[6], 1e-5);
    if (out->ndim != 4 || !like(*x) || (second && !like(*second))) return false;
    if (x->sizes[1] + (second ? second->sizes[1] : 0) != out->sizes[1]) return false;
    if (second && second->sizes[1] == 0) second = nullptr;
    if (groups < 1 || out->sizes[1] % groups) return false;
    if (!vector(args[2], 1, weight) || !vector(args[3], 1, bias) || !vector(args[4], 2, scale) ||
        !vector(args[5], 2, shift)) {
      return false;
    }
    return parse_activation(args[7].s, act) && (act == Act::silu || act == Act::none);
  }
  bool like(const irt_view& part) const {
    return part.ndim == 4 && part.dtype == out->dtype && part.sizes[0] == out->sizes[0] &&
           part.sizes[2] == out->sizes[2] && part.sizes[3] == out->sizes[3];
  }
  bool vector(const irt_value& value, int ndim, const irt_view*& found) const {
    found = value.kind == IRT_TENSOR ? value.tensors : nullptr;
    if (value.kind == IRT_NONE) return true;
    return found && found->ndim == ndim && (found->dtype == IRT_F32 || found->dtype == out->dtype) &&
           found->sizes[ndim - 1] == out->sizes[1] && (ndim == 1 || found->sizes[0] == out->sizes[0]);
  }
};

}  // namespace irt::INPAINTRT_ISA
