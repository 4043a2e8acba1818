// gated_activation on the CPU: out = gain · act(f) · sigmoid(g), where y = [f | g] along the channels.
//
// The op is bound by memory: three streams, about 25 flops an element. One pass, no temporaries; eager makes three
// passes with two of them into fresh memory. Rows are whatever the layout merges to: all of a sample's C·H·W in NCHW,
// the C channels of a pixel in NHWC. Other strides take a gather loop that is correct, not fast.
#include "activation.h"
#include "kernel.h"
#include "loop.h"
#include "parallel.h"
#include "simd.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread is worth waking for
constexpr char kDtypes[] = "dtype must be float32, bfloat16 or float16";

struct Settings {
  Act act;
  float alpha, gain;
};

template <class T, Act act>
void forward_row(const T* f, const T* g, T* out, int64_t n, int64_t in_stride, int64_t out_stride, Settings s) {
  const Vec alpha(s.alpha), gain(s.gain);
  int64_t i = 0;
  if (in_stride == 1 && out_stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
      store(out + i, gain * activate<act>(load(f + i), alpha) * sigmoid(load(g + i)));
    }
  }
  for (; i < n; i += Vec::kWidth) {
    const int64_t some = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    const Vec fv = load_some(f + i * in_stride, some, in_stride), gv = load_some(g + i * in_stride, some, in_stride);
    store_some(out + i * out_stride, gain * activate<act>(fv, alpha) * sigmoid(gv), some, out_stride);
  }
}

template <Act act>
inline void slopes(Vec f, Vec g, Vec grad, Vec alpha, Vec gain, Vec& df, Vec& dg) {
  const Vec a = activate<act>(f, alpha), s = sigmoid(g), scaled = gain * grad * s;
  df = scaled * activation_slope<act>(f, a, alpha);
  dg = scaled * a * (Vec(1.0f) - s);
}

template <class T, Act act>
void backward_row(const T* f, const T* g, const T* grad, T* df, T* dg, int64_t n, int64_t in_stride,
                  int64_t grad_stride, int64_t out_stride, Settings s) {
  const Vec alpha(s.alpha), gain(s.gain);
  Vec f_slope, g_slope;
  int64_t i = 0;
  if (in_stride == 1 && grad_stride == 1 && out_stride == 1) {
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
      slopes<act>(load(f + i), load(g + i), load(grad + i), alpha, gain, f_slope, g_slope);
      store(df + i, f_slope);
      store(dg + i, g_slope);
    }
  }
  for (; i < n; i += Vec::kWidth) {
    const int64_t some = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    slopes<act>(load_some(f + i * in_stride, some, in_stride), load_some(g + i * in_stride, some, in_stride),
                load_some(grad + i * grad_stride, some, grad_stride), alpha, gain, f_slope, g_slope);
    store_some(df + i * out_stride, f_slope, some, out_stride);
    store_some(dg + i * out_stride, g_slope, some, out_stride);
  }
}

// ---- from the call to rows ----------------------------------------------------------------------------------------

// The row's function is chosen once: loops over rows are the same for all activations.
template <class T>
void forward(const irt_view& y, const irt_view& out, Settings s, int threads) {
  const Loop<2> loop(4, out.sizes, {out.strides, y.strides});
  if (loop.total() == 0) return;  // pointers may be null
  const T* f = static_cast<const T*>(y.data);
  const T* g = f + out.sizes[1] * y.strides[1];
  T* o = static_cast<T*>(out.data);
  const int last = loop.ndim - 1;
  auto row = forward_row<T, Act::none>;
  with_activation(s.act, [&](auto act) { row = forward_row<T, act.value>; });
  parallel_for(loop.total(), kGrain, threads, [&](int64_t begin, int64_t end) {
    loop.rows(begin, end, [&](const int64_t* at, int64_t n) {
      row(f + at[1], g + at[1], o + at[0], n, loop.strides[1][last], loop.strides[0][last], s);
    });
  });
}

template <class T>
void backward(const irt_view& grad, const irt_view& y, const irt_view& out, Settings s, int threads) {
  const Loop<3> loop(4, grad.sizes, {out.strides, y.strides, grad.strides});
  if (loop.total() == 0) return;
  const T* f = static_cast<const T*>(y.data);
  const T* g = f + grad.sizes[1] * y.strides[1];
  T* df = static_cast<T*>(out.data);
  T* dg = df + grad.sizes[1] * out.strides[1];
  const T* dout = static_cast<const T*>(grad.data);
  const int last = loop.ndim - 1;
  auto row = backward_row<T, Act::none>;
  with_activation(s.act, [&](auto act) { row = backward_row<T, act.value>; });
  parallel_for(loop.total(), kGrain, threads, [&](int64_t begin, int64_t end) {
    loop.rows(begin, end, [&](const int64_t* at, int64_t n) {
      row(f + at[1], g + at[1], dout + at[2], df + at[0], dg + at[0], n, loop.strides[1][last], loop.strides[2][last],
          loop.strides[0][last], s);
    });
  });
}

// Arguments from `first` on: y, activation, alpha, gain. `half` has y's shape with half the channels.
bool read(const irt_call& call, int first, const irt_view& half, Settings& s, irt_status& status) {
  const irt_view* y = tensor_arg(call, first, status);
  if (!y) return false;
  if (call.nargs < first + 4 || call.args[first + 1].kind != IRT_STRING || !is_number_or_none(call.args[first + 2]) ||
      !is_number_or_none(call.args[first + 3])) {
    fail(status, IRT_BAD_ARGUMENT, "expected y, activation, alpha and gain");
    return false;
  }
  if (!parse_activation(call.args[first + 1].s, s.act)) {
    fail(status, IRT_BAD_ARGUMENT, "unknown activation");
    return false;
  }
  bool same = y->ndim == 4 && half.ndim == 4 && y->dtype == half.dtype && y->sizes[1] == 2 * half.sizes[1];
  same = same && y->sizes[0] == half.sizes[0] && y->sizes[2] == half.sizes[2] && y->sizes[3] == half.sizes[3];
  if (!same) {
    fail(status, IRT_BAD_ARGUMENT,
         "y must be (B, 2C, H, W) and the output (or its gradient) (B, C, H, W) of the same dtype");
    return false;
  }
  s.alpha = static_cast<float>(float_arg(call.args[first + 2], default_alpha(s.act)));
  s.gain = static_cast<float>(float_arg(call.args[first + 3], 1.0));
  return true;
}

// (y, activation, alpha, gain) -> out
void gated_activation(const irt_call& call, irt_status& status) {
  Settings s;
  if (call.nargs != 4 || call.nouts != 1) {
    return fail(status, IRT_BAD_ARGUMENT, "expected (y, activation, alpha, gain) and one output");
  }
  if (!read(call, 0, call.outs[0], s, status)) return;
  const irt_view &y = *call.args[0].tensors, &out = call.outs[0];
  switch (out.dtype) {
    case IRT_F32: return forward<float>(y, out, s, call.threads);
    case IRT_BF16: return forward<bf16>(y, out, s, call.threads);
    case IRT_F16: return forward<f16>(y, out, s, call.threads);
    default: return fail(status, IRT_UNSUPPORTED, kDtypes);
  }
}

// ([grad], y, activation, alpha, gain, needs) -> [dy]
void gated_activation_backward(const irt_call& call, irt_status& status) {
  Settings s;
  if (call.nargs != 6 || call.nouts != 1 || call.args[0].kind != IRT_TENSORS || call.args[0].count != 1) {
    return fail(status, IRT_BAD_ARGUMENT, "expected ([grad], y, activation, alpha, gain, needs) and one output");
  }
  const irt_view& grad = call.args[0].tensors[0];
  if (!read(call, 1, grad, s, status)) return;
  const irt_view& y = *call.args[1].tensors;
  const irt_view& out = call.outs[0];
  if (out.ndim != 4 || out.dtype != y.dtype || memcmp(out.sizes, y.sizes, 4 * sizeof y.sizes[0])) {
    return fail(status, IRT_BAD_ARGUMENT, "the gradient of y must have y's shape and dtype");
  }
  switch (grad.dtype) {
    case IRT_F32: return backward<float>(grad, y, out, s, call.threads);
    case IRT_BF16: return backward<bf16>(grad, y, out, s, call.threads);
    case IRT_F16: return backward<f16>(grad, y, out, s, call.threads);
    default: return fail(status, IRT_UNSUPPORTED, kDtypes);
  }
}

}  // namespace

IRT_CPU_KERNEL(gated_activation)
IRT_CPU_KERNEL(gated_activation_backward)

}  // namespace irt::INPAINTRT_ISA
