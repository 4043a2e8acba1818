// partial_conv2d on the CPU: the engine (conv.h) on x · mask, renormalised by planes that are made first
// (partial_planes.h). Windows with few valid pixels are computed once more where the algorithm taken for their image
// rounds too coarsely for them (partial_windows.h).
#include "arena.h"
#include "conv_call.h"
#include "partial_planes.h"
#include "partial_windows.h"

namespace irt::INPAINTRT_ISA {
namespace {

enum { kX, kMask, kWeight, kBias, kStride, kPadding, kDilation, kScale, kEps, kArguments };

// Why the arguments are not those of this op, or null.
const char* read(const irt_call& call, conv::Call& c) {
  const irt_value* a = call.args;
  c.out = &call.outs[0], c.threads = call.threads, c.ieee = call.ieee, c.upsample = 1, c.act = Act::none;
  if (const char* fault = conv::read_image(a[kX], c)) return fault;
  if (const char* fault = conv::read_weight(a[kWeight], c)) return fault;
  if (const char* fault = conv::read_geometry(a[kStride], a[kPadding], a[kDilation], c)) return fault;
  if (const char* fault = conv::read_vector(a[kBias], c.weight->sizes[0], c, c.bias)) return fault;
  if (const char* fault = conv::read_mask(a[kMask], c)) return fault;
  if (!c.mask) return "mask must be a tensor";
  if (!conv::is(a[kScale], "window") && !conv::is(a[kScale], "one")) return "scale must be window or one";
  if (!is_number_or_none(a[kEps])) return "eps must be a number";
  if (const char* fault = conv::check_sizes(c)) return fault;
  const irt_view &out = *c.out, &updated = call.outs[1];
  const bool alike = updated.ndim == 4 && updated.dtype == out.dtype && updated.sizes[0] == out.sizes[0] &&
                     updated.sizes[1] == 1 && updated.sizes[2] == out.sizes[2] && updated.sizes[3] == out.sizes[3];
  return alike ? nullptr : "the updated mask must be (B, 1, H', W') of x's dtype";
}

// How each image of a call is computed. The algorithms are chosen for the whole batch and each image is judged by its
// own mask: what it gets does not depend on the other masks.
template <class T>
class Judge {
 public:
  Judge(const conv::Call& call, const MaskPlanes<T>& planes)
      : call_(call), planes_(planes), usual_(conv::planned(call)) {
    conv::Call ieee = call;
    ieee.ieee = true;
    exact_ = conv::planned(ieee);
  }

  conv::Runner runner(int64_t image) const { return exactly(image) ? exact_.run : usual_.run; }
  // Whether its thin windows are so many that it costs less to have the direct form's rounding error everywhere.
  bool exactly(int64_t image) const {
    if (!coarse(image)) return false;
    const double gained = (exact_.cost - usual_.cost) / static_cast<double>(call_.batch());
    return conv::cost_of_windows(call_, planes_.thin(image)) >= gained;
  }
  // Whether they are computed once more.
  bool mends(int64_t image) const { return coarse(image) && !exactly(image); }

 private:
  const conv::Call& call_;
  const MaskPlanes<T>& planes_;
  conv::Plan usual_, exact_;

  bool coarse(int64_t image) const { return !usual_.exact && planes_.thin(image) > 0; }
};

// Some images of a call as a call of the engine.
template <class T>
class Part {
 public:
  conv::Call call;

  Part(const conv::Call& whole, const MaskPlanes<T>& planes, int64_t first, int64_t end)
      : call(whole), x_(*whole.x), mask_(*whole.mask), out_(*whole.out) {
    for (irt_view* view : {&x_, &mask_, &out_}) {
      if (view == &mask_ && mask_.sizes[0] == 1) continue;
      view->data = static_cast<T*>(view->data) + first * view->strides[0];
      view->sizes[0] = end - first;
    }
    call.x = &x_, call.mask = &mask_, call.out = &out_;
    call.ratio = planes.ratio(first), call.valid = planes.valid(first);
  }
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

 private:
  irt_view x_, mask_, out_;
};

// The memory for everything is there before an output is written.
template <class T>
void compute(conv::Call& c, const MaskPlanes<T>& planes, const irt_view& updated, irt_status& status) {
  const Judge<T> judge(c, planes);
  const auto each_part = [&](const auto& then) {  // neighbours that are computed alike
    for (int64_t first = 0, end; first < c.batch(); first = end) {
      for (end = first + 1; end < c.batch() && judge.exactly(end) == judge.exactly(first);) ++end;
      Part<T> part(c, planes, first, end);
      then(judge.runner(first), part.call);
    }
  };
  size_t most_needed = 0;
  const auto need = [&](size_t bytes) { most_needed = bytes > most_needed ? bytes : most_needed; };
  each_part([&](conv::Runner runner, conv::Call& part) {
    size_t needed = 0;
    part.needed = &needed;
    runner(part, status);
    need(needed);
  });
  const ThinWindows<T> thin(c, planes);
  bool mends = false;
  for (int64_t b = 0; b < c.batch(); ++b) mends = mends || judge.mends(b);
  if (mends) need(thin.bytes(status));
  const Workspace space(most_needed);
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  planes.write(updated);
  each_part([&](conv::Runner runner, conv::Call& part) {
    part.space = static_cast<float*>(space.data());
    runner(part, status);
  });
  if (mends) thin.compute(static_cast<float*>(space.data()), [&](int64_t b) { return judge.mends(b); }, status);
}

// Makes the planes, then goes on with them: then(call, planes).
//
// (x, mask, weight, bias | none, stride, padding[4], dilation, scale, eps) -> out, updated mask
template <class Then>
void prepare(const irt_call& call, irt_status& status, const Then& then) {
  if (call.nargs != kArguments || call.nouts != 2) {
    return fail(status, IRT_BAD_ARGUMENT, "expected the 9 arguments of partial_conv2d and two outputs");
  }
  conv::Call c{};
  if (const char* fault = read(call, c)) return fail(status, IRT_BAD_ARGUMENT, fault);
  if (c.batch() == 0) return;
  if (!conv::fits(c)) return fail(status, IRT_OUT_OF_MEMORY, "no memory for a workspace of that size");
  c.threads = static_cast<int>(most(1, least(c.threads, 1024)));
  const double area = static_cast<double>(c.mask->sizes[1] * c.kernel_height() * c.kernel_width());
  const double window = conv::is(call.args[kScale], "window") ? area : 1.0, eps = float_arg(call.args[kEps], 1e-8);
  const auto with_planes = [&](auto planes) {
    const Workspace space(static_cast<size_t>(planes.floats()) * sizeof(float));
    if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the mask's planes");
    planes.make(static_cast<float*>(space.data()));
    const irt_view mask = planes.mask();
    conv::Call masked = c;
    masked.mask = &mask;
    then(masked, planes);
  };
  if (c.x->dtype == IRT_F32) return with_planes(MaskPlanes<float>(c, window, eps));
  if (c.x->dtype == IRT_BF16) return with_planes(MaskPlanes<bf16>(c, window, eps));
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

void partial_conv2d(const irt_call& call, irt_status& status) {
  prepare(call, status, [&](conv::Call& c, const auto& planes) { compute(c, planes, call.outs[1], status); });
}

// Many windows with few valid pixels rule out Winograd's larger forms: the mask decides, too. Of images that differ in
// that the first one's choice is told.
void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  prepare(call, status, [&](conv::Call& c, const auto& planes) {
    c.ieee = c.ieee || Judge(c, planes).exactly(0);
    conv::choose(c, choice);
  });
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(partial_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
