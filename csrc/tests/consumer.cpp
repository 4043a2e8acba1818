// How a C++ program uses the kernels without Python: find one by its name, describe tensors by views, call it.
//
//   consumer               runs gated_activation on a small tensor, prints the instruction set and the result
//
// Link with the static library as a whole archive, because kernels are found through a linker section:
// target_link_libraries(app PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,inpaintrt_cpu>). The only header is abi.h.
#include <cmath>
#include <cstdio>
#include <vector>

#include "inpaintrt/abi.h"

namespace {

// A contiguous (B, C, H, W) tensor.
irt_view view(std::vector<float>& data, int64_t b, int64_t c, int64_t h, int64_t w) {
  return {data.data(), IRT_F32, 4, {b, c, h, w}, {c * h * w, h * w, w, 1}};
}

irt_value tensor(const irt_view& v) {
  irt_value value{IRT_TENSOR, 1, {}};
  value.tensors = &v;
  return value;
}

irt_value text(const char* s) {
  irt_value value{IRT_STRING, 1, {}};
  value.s = s;
  return value;
}

irt_value number(double f) {
  irt_value value{IRT_FLOAT, 1, {}};
  value.f = f;
  return value;
}

}  // namespace

int main() {
  if (irt_abi_version() != IRT_ABI_VERSION) {
    fprintf(stderr, "header and library disagree: ABI %d and %d\n", IRT_ABI_VERSION, irt_abi_version());
    return 1;
  }
  if (!irt_cpu_isa()) {
    printf("%s\n", irt_cpu_isa_error());
    return 77;
  }
  printf("instruction set: %s\nkernels:", irt_cpu_isa());
  for (int i = 0; i < irt_cpu_count(); ++i) printf(" %s", irt_cpu_name(i));
  printf("\n");

  const irt_kernel gated_activation = irt_cpu_find("gated_activation");
  if (!gated_activation) {
    fprintf(stderr, "this build has no kernel gated_activation\n");
    return 1;
  }

  // y = [features | gates] along the channels; out = gain · elu(features) · sigmoid(gates).
  const int64_t h = 3, w = 5;
  std::vector<float> y(2 * h * w), out(h * w, NAN);
  for (size_t i = 0; i < y.size(); ++i) y[i] = 0.25f * static_cast<float>(i) - 3.0f;
  const irt_view y_view = view(y, 1, 2, h, w), out_view = view(out, 1, 1, h, w);
  const irt_value args[] = {tensor(y_view), text("elu"), {IRT_NONE, 1, {}}, number(1.0)};

  irt_call call{};
  call.args = args;
  call.nargs = 4;
  call.outs = &out_view;
  call.nouts = 1;
  call.threads = 2;
  call.device = -1;
  irt_status status;
  gated_activation(&call, &status);
  if (status.code != IRT_OK) {
    fprintf(stderr, "gated_activation: %s\n", status.message);
    return 1;
  }

  double worst = 0.0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double f = y[i], g = y[i + out.size()];
    const double want = (f > 0.0 ? f : std::expm1(f)) / (1.0 + std::exp(-g));
    worst = std::fmax(worst, std::fabs(out[i] - want) / std::fmax(std::fabs(want), 1e-30));
  }
  printf("out[0] = %.7g, largest relative error %.1e, OpenMP runtime: %s\n", out[0], worst, irt_openmp_runtime());
  return worst < 1e-6 ? 0 : 1;
}
