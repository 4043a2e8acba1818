// modulated_conv2d on the CPU: the engine (conv.h) with the shared weight; the style scales channels while they are
// read, the demodulation scales sums.
//
// Doubling has two forms. One is a transposed convolution by phases, whose result the filter then reads. In the other
// the image is read through the filter, and the convolution is a plain one of twice the size, which Winograd's form
// computes with as many products. It has more filters to transform, so that it pays for large float32 images of many
// channels only.
#include <cmath>

#include "conv_call.h"
#include "modulated_call.h"
#include "resample_image.h"

namespace irt::INPAINTRT_ISA {
namespace {

using namespace modulated;

// Where Winograd's form is ahead of the one by phases; measured on AVX-512.
constexpr int64_t kLargeImage = 48 * 48, kManyInputs = 384;

// The numbers of a style as floats: (B, Cin) factors of inputs, (B, Cout) of outputs, planes of noise.
template <class T>
class Numbers {
 public:
  explicit Numbers(const Modulated& m) : m_(m), weight_(*m.given), kernel_(weight_.sizes[2] * weight_.sizes[3]) {}

  int64_t floats() const {
    return vectors(images() * inputs()) + vectors(images() * outputs()) + vectors(noise_floats()) +
           images() * vectors(inputs() * kernel_) + threads() * vectors(inputs() * kernel_);
  }

  void make(float* space, conv::Style& style) const {
    float* factors = space;
    float* norms = factors + vectors(images() * inputs());
    float* noise = norms + vectors(images() * outputs());
    float* squares = noise + vectors(noise_floats());
    const irt_view& values = *m_.values;
    for (int64_t b = 0; b < images(); ++b) {
      for (int64_t c = 0; c < inputs(); ++c) {
        const T* value = static_cast<const T*>(values.data) + b * values.strides[0] + c * values.strides[1];
        factors[b * inputs() + c] = m_.weight_gain * to_float(*value);
      }
    }
    style.inputs = factors, style.outputs = nullptr, style.noise = nullptr;
    if (m_.demodulate) demodulate(factors, squares, norms), style.outputs = norms;
    if (m_.noise) strengthen(noise), style.noise = noise;
  }

 private:
  const Modulated& m_;
  const irt_view& weight_;
  int64_t kernel_;

  int64_t images() const { return m_.call.batch(); }
  int64_t inputs() const { return weight_.sizes[1]; }
  int64_t outputs() const { return weight_.sizes[0]; }
  int64_t threads() const { return conv::threads_of(m_.call, outputs()); }
  int64_t noise_floats() const { return m_.noise ? m_.style.planes * m_.call.height() * m_.call.width() : 0; }

  void strengthen(float* to) const {
    const irt_view& n = *m_.noise;
    const float strength = m_.strength ? to_float(*static_cast<const T*>(m_.strength->data)) : 1.0f;
    for (int64_t b = 0; b < n.sizes[0]; ++b) {
      for (int64_t y = 0; y < n.sizes[2]; ++y) {
        const T* row = static_cast<const T*>(n.data) + b * n.strides[0] + y * n.strides[2];
        for (int64_t x = 0; x < n.sizes[3]; ++x) *to++ = strength * to_float(row[x * n.strides[3]]);
      }
    }
  }

  // (Σ (weight · factor)² + eps)^−½ of each image and output.
  void demodulate(const float* factors, float* squares, float* norms) const {
    const int64_t length = inputs() * kernel_, line = vectors(length);
    for (int64_t b = 0; b < images(); ++b) {
      float* to = squares + b * line;
      for (int64_t c = 0; c < inputs(); ++c) {
        const float factor = factors[b * inputs() + c];
        for (int64_t t = 0; t < kernel_; ++t) *to++ = factor * factor;
      }
    }
    int next = 0;
    parallel_for(outputs(), 8, static_cast<int>(threads()), [&](int64_t begin, int64_t end) {
      float* copy = squares + (images() + __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) * line;
      for (int64_t o = begin; o < end; ++o) {
        const T* filter = static_cast<const T*>(weight_.data) + o * weight_.strides[0];
        if (!dense()) gather(filter, copy);
        for (int64_t b = 0; b < images(); ++b) {
          const float* factor = squares + b * line;
          const float sum = dense() ? product(filter, factor, length) : product(copy, factor, length);
          norms[b * outputs() + o] = 1.0f / std::sqrt(sum + m_.eps);
        }
      }
    });
  }

  bool dense() const {
    const int64_t *sizes = weight_.sizes, *strides = weight_.strides;
    return (strides[3] == 1 || sizes[3] == 1) && (strides[2] == sizes[3] || sizes[2] == 1) &&
           (strides[1] == kernel_ || sizes[1] == 1);
  }

  void gather(const T* from, float* to) const {
    for (int64_t c = 0; c < inputs(); ++c) {
      for (int64_t i = 0; i < weight_.sizes[2]; ++i) {
        for (int64_t j = 0; j < weight_.sizes[3]; ++j) {
          *to++ = to_float(from[c * weight_.strides[1] + i * weight_.strides[2] + j * weight_.strides[3]]);
        }
      }
    }
  }

  // Σ filter² · squares
  template <class Number>
  static float product(const Number* filter, const float* squares, int64_t length) {
    constexpr int64_t W = Vec::kWidth;
    Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
    for (int64_t i = 0; i < length; i += W) {
      const int64_t some = least(W, length - i);
      const Vec w = load_some(filter + i, some);
      sums[i / W % 2] = fma(w * w, load_some(squares + i, some), sums[i / W % 2]);
    }
    float lanes[W], total = 0.0f;
    store(lanes, sums[0] + sums[1]);
    for (const float lane : lanes) total += lane;
    return total;
  }
};

// Reads x through the filter, enlarged or not: the convolution itself has no padding then.
void read_through(Modulated& m, Resampling& filter) {
  conv::Call& c = m.call;
  filter.up_x = filter.up_y = m.up, filter.top = m.before[0], filter.left = m.before[1];
  filter.set(*m.filter, static_cast<float>(m.up * m.up), false);
  m.style.filter = &filter;
  m.style.height = c.x->sizes[2] * m.up + m.before[0] + m.after[0] - taps(m, 0) + 1;
  m.style.width = c.x->sizes[3] * m.up + m.before[1] + m.after[1] - taps(m, 1) + 1;
  c.stride = m.down;
}

bool by_phases(const Modulated& m) {
  const conv::Call& c = m.call;
  if (m.up == 1) return false;
  const bool winograd = c.x->dtype == IRT_F32 && !c.ieee && c.weight->sizes[2] == 3 && c.weight->sizes[3] == 3;
  return !winograd || c.height() * c.width() < kLargeImage || c.weight->sizes[1] < kManyInputs;
}

// The transposed convolution alone, whose output is (B, H″, W″, Cout) in memory.
struct Enlarged {
  irt_view weight, image;
  conv::Style style{};
  conv::Call call;

  explicit Enlarged(const Modulated& m) : weight(m.weight), image(*m.call.out), call(m.call) {
    if (!m.flipped) mirror(weight, weight.dtype);  // a transposed convolution convolves
    for (int64_t* of : {weight.sizes, weight.strides}) {
      const int64_t first = of[0];
      of[0] = of[1], of[1] = first;
    }
    for (int d = 2; d < 4; ++d) image.sizes[d] = (m.call.x->sizes[d] - 1) * 2 + weight.sizes[d];
    image.strides[1] = 1, image.strides[3] = image.sizes[1];
    image.strides[2] = image.sizes[3] * image.strides[3], image.strides[0] = image.sizes[2] * image.strides[2];
    style.inputs = m.style.inputs, style.planes = 1, style.gain = 1.0f, style.clamp = INFINITY;
    call.weight = &weight, call.out = &image, call.style = &style, call.bias = nullptr, call.act = Act::none;
    call.transposed = true, call.stride = 2;
  }
  Enlarged(const Enlarged&) = delete;
  Enlarged& operator=(const Enlarged&) = delete;

  int64_t elements() const { return image.sizes[0] * image.strides[0]; }
};

// Elements [first, first + count) of dimension d.
void cut(irt_view& view, int d, int64_t first, int64_t count) {
  view.data = static_cast<char*>(view.data) + first * view.strides[d] * (view.dtype == IRT_F32 ? 4 : 2);
  view.sizes[d] = count;
}

// A doubling by phases. The enlarged image is the filter's input and nobody else's, so that of a large one only some
// rows exist at a time: at 512 pixels it would be as large as the result.
template <class T>
class Doubling {
 public:
  explicit Doubling(const Modulated& m) : m_(m), whole_(m), runner_(nullptr) {
    filter_.up_x = filter_.up_y = 1;
    filter_.top = m.before[0] - kernel() + 1, filter_.left = m.before[1] - m.weight.sizes[3] + 1;
    filter_.set(*m.filter, 4.0f, false);
    const int64_t image = most(1, whole_.image.strides[0] * static_cast<int64_t>(sizeof(T))), height = m.call.height();
    const int64_t bands = ceil_div(image, kBand);
    images_ = most(1, least(kBand / image, m.call.batch()));
    rows_ = ceil_div(height, most(1, least(bands, height / kLeastRows)));
    most_rows_ = least(whole_.image.sizes[2], rows_ + filter_.rows);  // one more than the filter reads: see `run`
  }

  void run(irt_status& status) {
    if (!conv::fits(whole_.call)) return fail(status, IRT_OUT_OF_MEMORY, "no memory for an image of that size");
    const Workspace space(static_cast<size_t>(images_ * most_rows_ * whole_.image.strides[2]) * sizeof(T));
    if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the enlarged image");
    runner_ = conv::planned(whole_.call).run;
    for (int64_t b = 0; b < m_.call.batch(); b += images_) {
      for (int64_t y = 0; y < m_.call.height() && status.code == IRT_OK; y += rows_) {
        run(b, least(images_, m_.call.batch() - b), y, least(rows_, m_.call.height() - y), space.data(), status);
      }
    }
  }

 private:
  static constexpr int64_t kBand = int64_t{64} << 20;  // bytes; of less, making the filters' matrices anew would tell
  static constexpr int64_t kLeastRows = 16;

  const Modulated& m_;
  Enlarged whole_;
  Resampling filter_;
  conv::Runner runner_;
  int64_t images_, rows_, most_rows_;  // of outputs at a time, and of the enlarged image

  int64_t kernel() const { return m_.weight.sizes[2]; }

  // `rows` rows of outputs from row y on, of `images` images from b on.
  void run(int64_t b, int64_t images, int64_t y, int64_t rows, void* space, irt_status& status) {
    // The enlarged rows that the filter reads, from an even one on, so that phases are those of the whole image; and
    // the rows of x that these are made of.
    const int64_t height = whole_.image.sizes[2];
    const int64_t begin = most(0, least(height - 1, y - filter_.top)) / 2 * 2;
    const int64_t end = most(begin + 1, least(height, y + rows - 1 - filter_.top + filter_.rows));
    const int64_t from = most(0, ceil_div(begin - kernel() + 1, 2)), to = least(m_.call.x->sizes[2], ceil_div(end, 2));
    irt_view x = *m_.call.x, enlarged = whole_.image, out = *m_.call.out;
    cut(x, 0, b, images), cut(x, 2, from, to - from);
    cut(out, 0, b, images), cut(out, 2, y, rows);
    enlarged.data = space, enlarged.sizes[0] = images, enlarged.sizes[2] = end - begin;
    enlarged.strides[0] = enlarged.sizes[2] * enlarged.strides[2];

    conv::Style reads = whole_.style, writes = m_.style;
    conv::Call call = whole_.call, finish = m_.call;
    if (reads.inputs) reads.inputs += b * call.inputs();
    call.x = &x, call.out = &enlarged, call.style = &reads, call.top = begin - 2 * from;
    runner_(call, status);
    if (status.code != IRT_OK) return;

    Resampling filter = filter_;
    filter.top += begin - y;
    writes.inputs = nullptr;
    if (writes.outputs) writes.outputs += b * finish.outputs();
    if (writes.noise) writes.noise += ((writes.planes == 1 ? 0 : b) * finish.height() + y) * finish.width();
    finish.out = &out, finish.style = &writes;
    conv::resample_image<T>(enlarged, filter, 1, 1, finish, status);
  }
};

template <class T>
void run(Modulated& m, irt_status& status) {
  const Numbers<T> numbers(m);
  const Workspace space(static_cast<size_t>(numbers.floats()) * sizeof(float));
  if (!space.data()) return fail(status, IRT_OUT_OF_MEMORY, "no memory for the style's numbers");
  numbers.make(static_cast<float*>(space.data()), m.style);
  if (by_phases(m)) return Doubling<T>(m).run(status);
  conv::run(m.call, status);
}

// Reads the arguments and settles how the image is read; false with a status where there is nothing to do or a fault.
bool prepare(const irt_call& call, Modulated& m, Resampling& filter, irt_status& status) {
  if (const char* fault = read(call, m)) {
    fail(status, IRT_BAD_ARGUMENT, fault);
  } else if (m.call.batch() > 0 && !conv::fits(m.call)) {
    fail(status, IRT_OUT_OF_MEMORY, "no memory for a workspace of that size");
  } else if (m.call.x->dtype != IRT_F32 && m.call.x->dtype != IRT_BF16) {
    fail(status, IRT_UNSUPPORTED, "dtype must be float32 or bfloat16");
  }
  if (status.code != IRT_OK || m.call.batch() == 0) return false;
  conv::Call& c = m.call;
  c.stride = 1;
  if (by_phases(m)) return true;
  if (m.up * m.down > 1) {
    read_through(m, filter);
  } else {
    c.top = c.left = c.bottom = c.right = m.padding;
  }
  if (m.flipped) mirror(m.weight, m.weight.dtype);
  return true;
}

void modulated_conv2d(const irt_call& call, irt_status& status) {
  Modulated m;
  Resampling filter;
  if (!prepare(call, m, filter, status)) return;
  if (m.call.x->dtype == IRT_F32) return run<float>(m, status);
  run<bf16>(m, status);
}

void choose(const irt_call& call, irt_choice& choice, irt_status& status) {
  Modulated m;
  Resampling filter;
  if (!prepare(call, m, filter, status)) return;
  if (!by_phases(m)) return conv::choose(m.call, choice);
  conv::choose(Enlarged(m).call, choice);
}

}  // namespace

IRT_CPU_KERNEL_OF_SEVERAL(modulated_conv2d, choose)

}  // namespace irt::INPAINTRT_ISA
