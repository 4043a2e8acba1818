// partial_conv2d on the CPU: the engine (conv.h) on x · mask, renormalised by planes that are made first.
//
// The sum of the mask over a window does not depend on the output channel: the mask's channels are summed to one plane,
// and that is summed over windows by rows and then columns.
#include <cmath>

#include "arena.h"
#include "conv_call.h"
#include "parallel.h"

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

template <class T>
class Planes {
 public:
  Planes(const conv::Call& call, double window, double eps)
      : call_(call), window_(static_cast<float>(window)), eps_(static_cast<float>(eps)) {}

  int64_t images() const { return call_.mask->sizes[0]; }
  int64_t area() const { return call_.height() * call_.width(); }
  int64_t rows() const { return images() * call_.height(); }
  // Ratio and valid of all images, the smallest and largest sum of each row, and a row of column sums per thread.
  int64_t floats() const {
    return 2 * vectors(call_.batch() * area()) + vectors(2 * rows()) + call_.threads * scratch();
  }
  int64_t scratch() const { return vectors(call_.x->sizes[3]); }

  // ratio = window / (s + eps) · u and valid = u for each output pixel, and u as a tensor if there is one. Returns
  // whether there are windows with few valid pixels, whose sums' rounding errors are multiplied with them.
  bool make(float* ratio, float* valid, float* space, const irt_view* updated) const {
    int next = 0;
    float *ranges = space, *lines = space + vectors(2 * rows());
    parallel_for(rows(), 16, call_.threads, [&](int64_t begin, int64_t end) {
      float* sums = lines + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / call_.height(), y = i % call_.height(), at = i * call_.width();
        row(b, y, sums, ratio + at, valid + at, ranges + 2 * i);
        for (int64_t image = b; image < (images() == 1 ? call_.batch() : b + 1); ++image) {
          if (updated) {
            T* to = static_cast<T*>(updated->data) + image * updated->strides[0] + y * updated->strides[2];
            for (int64_t x = 0; x < call_.width(); ++x) from_float(valid[at + x], to[x * updated->strides[3]]);
          }
          if (image == b) continue;
          const int64_t copy = (image * call_.height() + y) * call_.width();
          memcpy(ratio + copy, ratio + at, static_cast<size_t>(call_.width()) * sizeof(float));
          memcpy(valid + copy, valid + at, static_cast<size_t>(call_.width()) * sizeof(float));
        }
      }
    });
    float low = INFINITY, high = 0.0f;
    for (int64_t i = 0; i < rows(); ++i) {
      low = ranges[2 * i] < low ? ranges[2 * i] : low;
      high = ranges[2 * i + 1] > high ? ranges[2 * i + 1] : high;
    }
    return low < kSparse * high;
  }

 private:
  static constexpr float kSparse = 0.25f;  // of the fullest window; from there on Winograd's bound of error holds

  const conv::Call& call_;
  float window_, eps_;

  void row(int64_t b, int64_t y, float* sums, float* ratio, float* valid, float* range) const {
    const irt_view& m = *call_.mask;
    const int64_t width = m.sizes[3], d = call_.dilation;
    memset(sums, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t i = 0; i < call_.kernel_height(); ++i) {
      const int64_t from = y * call_.stride - call_.top + i * d;
      if (from < 0 || from >= m.sizes[2]) continue;
      for (int64_t c = 0; c < m.sizes[1]; ++c) {
        const T* data = static_cast<const T*>(m.data) + b * m.strides[0] + c * m.strides[1] + from * m.strides[2];
        for (int64_t x = 0; x < width; ++x) sums[x] += to_float(data[x * m.strides[3]]);
      }
    }
    range[0] = INFINITY, range[1] = 0.0f;
    for (int64_t x = 0; x < call_.width(); ++x) {
      float s = 0.0f;
      for (int64_t j = 0; j < call_.kernel_width(); ++j) {
        const int64_t from = x * call_.stride - call_.left + j * d;
        if (from >= 0 && from < width) s += sums[from];
      }
      const float u = s > 0.0f ? s < 1.0f ? s : 1.0f : s == s ? 0.0f : s;  // NaN stays
      valid[x] = u;
      ratio[x] = window_ / (u == 0.0f ? 1.0f : s + eps_) * u;
      if (s > 0.0f && s < range[0]) range[0] = s;
      if (s > range[1]) range[1] = s;
    }
  }
};

template <class T, class Then>
void with_planes(conv::Call& c, double window, double eps, const irt_view* updated, irt_status& status,
                 const Then& then) {
  const Planes<T> planes(c, window, eps);
  const Workspace space(static_cast<size_t>(planes.floats()) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the mask's planes");
  float* ratio = static_cast<float*>(space.data());
  float* valid = ratio + vectors(c.batch() * planes.area());
  if (planes.make(ratio, valid, valid + vectors(c.batch() * planes.area()), updated)) c.ieee = true;
  c.ratio = ratio, c.valid = valid;
  then(c);
}

// Makes the planes, and the updated mask where it is wanted; then goes on with a call of the engine.
//
// (x, mask, weight, bias | none, stride, padding[4], dilation, scale, eps) -> out, updated mask
template <class Then>
void prepare(const irt_call& call, bool update, irt_status& status, const Then& then) {
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
  const irt_view* updated = update ? &call.outs[1] : nullptr;
  if (c.x->dtype == IRT_F32) return with_planes<float>(c, window, eps, updated, status, then);
  if (c.x->dtype == IRT_BF16) return with_planes<bf16>(c, window, eps, updated, status, then);
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

void partial_conv2d(const irt_call& call, irt_status& status) {
  prepare(call, true, status, [&](const conv::Call& c) { conv::run(c, status); });
}

// Few valid pixels in a window rule out Winograd's larger forms: the mask decides, too.
void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  prepare(call, false, status, [&](const conv::Call& c) { conv::choose(c, choice); });
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(partial_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
