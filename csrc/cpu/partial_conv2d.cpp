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

// What is made of the mask before any output is written.
template <class T>
class Planes {
 public:
  Planes(const conv::Call& call, double window, double eps)
      : call_(call), window_(static_cast<float>(window)), eps_(static_cast<float>(eps)) {}

  // Ratio and valid of all images, the smallest and largest sum of each row, and a row of column sums per thread.
  int64_t floats() const {
    return 2 * vectors(call_.batch() * area()) + vectors(2 * rows()) + call_.threads * scratch();
  }

  // ratio = window / (s + eps) · u and valid = u for each output pixel.
  void make(float* space) {
    int next = 0;
    ratio_ = space, valid_ = ratio_ + vectors(call_.batch() * area()),
    ranges_ = valid_ + vectors(call_.batch() * area());
    float* lines = ranges_ + vectors(2 * rows());
    parallel_for(rows(), 16, call_.threads, [&](int64_t begin, int64_t end) {
      float* sums = lines + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / call_.height(), y = i % call_.height(), at = i * call_.width();
        row(b, y, sums, ratio_ + at, valid_ + at, ranges_ + 2 * i);
        for (int64_t image = b + 1; image < (images() == 1 ? call_.batch() : b + 1); ++image) {
          const int64_t copy = (image * call_.height() + y) * call_.width();
          memcpy(ratio_ + copy, ratio_ + at, static_cast<size_t>(call_.width()) * sizeof(float));
          memcpy(valid_ + copy, valid_ + at, static_cast<size_t>(call_.width()) * sizeof(float));
        }
      }
    });
  }

  // Whether an image has windows with few valid pixels, whose sums' rounding errors are multiplied with them.
  bool sparse(int64_t image) const {
    float low = INFINITY, high = 0.0f;
    const int64_t first = (images() == 1 ? 0 : image) * call_.height();
    for (int64_t i = first; i < first + call_.height(); ++i) {
      low = ranges_[2 * i] < low ? ranges_[2 * i] : low;
      high = ranges_[2 * i + 1] > high ? ranges_[2 * i + 1] : high;
    }
    return low < kSparse * high;
  }

  void write(const irt_view& updated) const {
    parallel_for(call_.batch() * call_.height(), 64, call_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / call_.height(), y = i % call_.height();
        T* to = static_cast<T*>(updated.data) + b * updated.strides[0] + y * updated.strides[2];
        for (int64_t x = 0; x < call_.width(); ++x)
          from_float(valid_[i * call_.width() + x], to[x * updated.strides[3]]);
      }
    });
  }

  const float* ratio(int64_t image) const { return ratio_ + image * area(); }
  const float* valid(int64_t image) const { return valid_ + image * area(); }

 private:
  static constexpr float kSparse = 0.25f;  // of the fullest window; from there on Winograd's bound of error holds

  const conv::Call& call_;
  float window_, eps_;
  float *ratio_ = nullptr, *valid_ = nullptr, *ranges_ = nullptr;

  int64_t images() const { return call_.mask->sizes[0]; }
  int64_t area() const { return call_.height() * call_.width(); }
  int64_t rows() const { return images() * call_.height(); }
  int64_t scratch() const { return vectors(call_.x->sizes[3]); }

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

// Some images of a call, which all are sparse or all are not, as a call of the engine.
template <class T>
class Part {
 public:
  conv::Call call;

  Part(const conv::Call& whole, const Planes<T>& planes, int64_t first, int64_t end)
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

// Where the images end that are computed together with the first: those after it that are sparse as it is.
template <class T>
int64_t end_of_part(const conv::Call& c, const Planes<T>& planes, int64_t first) {
  int64_t end = first + 1;
  while (end < c.batch() && planes.sparse(end) == planes.sparse(first)) ++end;
  return end;
}

// Each image is judged by its own mask, and the algorithms are chosen for the whole batch: what an image gets does not
// depend on the other masks. The memory for everything is there before an output is written.
template <class T>
void compute(conv::Call& c, const Planes<T>& planes, const irt_view& updated, irt_status& status) {
  conv::Runner runners[2];
  for (const bool sparse : {false, true}) {
    conv::Call judged = c;
    judged.ieee = c.ieee || sparse;
    runners[sparse] = conv::planned(judged);
  }
  const auto each_part = [&](const auto& then) {
    for (int64_t first = 0, end; first < c.batch(); first = end) {
      end = end_of_part(c, planes, first);
      Part<T> part(c, planes, first, end);
      then(runners[planes.sparse(first)], part.call);
    }
  };
  size_t most_needed = 0;
  each_part([&](conv::Runner runner, conv::Call& part) {
    size_t needed = 0;
    part.needed = &needed;
    runner(part, status);
    most_needed = needed > most_needed ? needed : most_needed;
  });
  const Workspace space(most_needed);
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the workspace");
  planes.write(updated);
  each_part([&](conv::Runner runner, conv::Call& part) {
    part.space = static_cast<float*>(space.data());
    runner(part, status);
  });
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
    then(c, planes);
  };
  if (c.x->dtype == IRT_F32) return with_planes(Planes<float>(c, window, eps));
  if (c.x->dtype == IRT_BF16) return with_planes(Planes<bf16>(c, window, eps));
  fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
}

void partial_conv2d(const irt_call& call, irt_status& status) {
  prepare(call, status, [&](conv::Call& c, const auto& planes) { compute(c, planes, call.outs[1], status); });
}

// Few valid pixels in a window rule out Winograd's larger forms: the mask decides, too. Of images that differ in that
// the first one's choice is told.
void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  prepare(call, status, [&](conv::Call& c, const auto& planes) {
    c.ieee = c.ieee || planes.sparse(0);
    conv::choose(c, choice);
  });
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(partial_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
