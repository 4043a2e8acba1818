// Launch plan of modulated_conv2d: weights packed, the style's factors, then the convolution (conv2d_call.h); before
// it, where it halves, or after it, where it doubles, the filter.
#include "modulated_conv2d.h"

#include "resample_plan.h"

#include "modulated_call.h"

namespace irt::plan {
namespace {

using modulated::Modulated;

constexpr int64_t kAlign = 256;

// An image in the workspace, laid out as `like`.
irt_view between(const irt_view& like, int64_t channels, int64_t height, int64_t width) {
  irt_view view = like;
  const bool inner = conv2d::channels_inner(like);
  view.data = nullptr;
  view.sizes[1] = channels, view.sizes[2] = height, view.sizes[3] = width;
  view.strides[1] = inner ? 1 : height * width;
  view.strides[3] = inner ? channels : 1;
  view.strides[2] = width * view.strides[3];
  view.strides[0] = channels * height * width;
  return view;
}

class Planner {
 public:
  Planner(const Modulated& m, const irt_call& call, irt_plan& plan, irt_status& status)
      : m_(m), call_(call), plan_(plan), status_(status), type_(storage(m.call.x->dtype)) {}

  void run() {
    const irt_view &x = *m_.call.x, &out = *m_.call.out;
    conv2d::Arguments arguments{};
    arguments.call = m_.call;
    conv::Call& c = arguments.call;
    c.bias = nullptr, c.style = nullptr, c.act = Act::none;  // are ours
    irt_view image{}, weight = *m_.given;
    if (m_.flipped != (m_.up > 1)) modulated::mirror(weight, weight.dtype);  // a transposed convolution convolves
    if (m_.up > 1) {
      std::swap(weight.sizes[0], weight.sizes[1]);
      std::swap(weight.strides[0], weight.strides[1]);
      image =
          between(out, out.sizes[1], 2 * (x.sizes[2] - 1) + weight.sizes[2], 2 * (x.sizes[3] - 1) + weight.sizes[3]);
      c.out = &image, c.transposed = true;
    } else if (m_.down > 1) {
      image =
          between(x, x.sizes[1], 2 * (out.sizes[2] - 1) + weight.sizes[2], 2 * (out.sizes[3] - 1) + weight.sizes[3]);
      c.x = &image;
    } else {
      c.top = c.left = c.bottom = c.right = m_.padding;
    }
    c.stride = m_.up * m_.down;
    arguments.weight = arguments.all = weight;
    c.weight = &arguments.all;

    ModulatedConv2d p{};
    conv2d::Choice choice{};
    if (!conv2d::prepare(arguments, call_, p.conv, choice, plan_, status_) || !plan_.count) return;
    const int64_t images = x.sizes[0], floats = sizeof(float);
    p.inputs_at = reserve(images * x.sizes[1] * floats);
    p.sums_at = reserve(images * out.sizes[1] * floats);
    const int64_t element = 16 / type_.per_vector;
    const int64_t image_at = image.ndim ? reserve(image.sizes[0] * image.strides[0] * element) : 0;
    p.image_at = p.out_at = image_at;
    p.gain = 1.0f, p.bound = INFINITY, p.act = static_cast<int>(Act::none);
    if (!add_modulation(p)) return;
    if (m_.down > 1 && !add_filter(x, image, image_at, false)) return;
    if (m_.up == 1) finish(p);
    conv2d::finish("modulated_conv2d", p, choice, plan_, status_);
    if (m_.up > 1 && status_.code == IRT_OK) add_filter(image, out, image_at, true);
  }

 private:
  const Modulated& m_;
  const irt_call& call_;
  irt_plan& plan_;
  irt_status& status_;
  Storage type_;

  int64_t reserve(int64_t bytes) {
    const int64_t at = ceil_div(plan_.workspace_bytes, kAlign) * kAlign;
    plan_.workspace_bytes = at + bytes;
    return at;
  }

  template <class Params>
  void finish(Params& p) const {
    p.noise = conv2d::tensor(m_.noise);
    p.strength = m_.strength ? m_.strength->data : nullptr;
    p.bias = conv2d::vector(m_.call.bias);
    p.act = static_cast<int>(m_.call.act), p.alpha = m_.call.alpha;
    p.gain = m_.style.gain, p.bound = m_.style.clamp;
  }

  bool add_modulation(const ModulatedConv2d& conv) {
    const irt_view &weight = *m_.given, &style = *m_.values;
    Modulation p{};
    p.weight = conv2d::tensor(&weight);
    p.style = style.data;
    for (int d = 0; d < 2; ++d) p.style_strides[d] = style.strides[d];
    p.inputs_at = conv.inputs_at, p.sums_at = conv.sums_at;
    p.channels = conv2d::narrow(weight.sizes[1]), p.outputs = conv2d::narrow(weight.sizes[0]);
    p.blocks = conv2d::narrow(ceil_div(weight.sizes[0], Modulation::kOutputs));
    p.taps = Divisor<int>::of(conv2d::narrow(weight.sizes[2] * weight.sizes[3]));
    p.columns = Divisor<int>::of(conv2d::narrow(weight.sizes[3]));
    p.gain = m_.weight_gain, p.eps = m_.eps, p.demodulate = m_.demodulate;
    const int64_t products = weight.sizes[1] * weight.sizes[2] * weight.sizes[3];
    const int64_t blocks = m_.values->sizes[0] * p.blocks;
    if (products > kNarrow - 32 || blocks > kMaxBlocks) {
      return fail(status_, IRT_UNSUPPORTED, conv2d::kTooLarge), false;
    }
    irt_launch* const launch = add_launch(plan_, blocks * Modulation::kThreads, Modulation::kThreads, status_);
    if (!launch) return false;
    snprintf(launch->entry, sizeof launch->entry, "irt::modulated_conv2d_style<%s>", type_.name);
    set_params(*launch, p);
    return true;
  }

  // The filter of a halving, or, `last`, of a doubling, whose image is the transposed convolution's.
  bool add_filter(const irt_view& from, const irt_view& to, int64_t image_at, bool last) {
    Resample p{};
    p.factor = p.gain = 1.0f, p.bound = INFINITY, p.act = static_cast<int>(Act::none);
    Steps steps = {{1, 1}, {1, 1}, {m_.before[0], m_.before[1]}};
    if (last) {
      finish(p);
      p.factor = 4.0f;
      for (int d = 0; d < 2; ++d) steps.before[d] -= m_.given->sizes[2 + d] - 1;
    }
    p.image_at = p.out_at = image_at;
    const irt_view* const filter = m_.filter == &m_.one ? nullptr : m_.filter;
    return resampled(from, to, filter, false, steps, p, status_) &&
           add_resample("modulated_conv2d_filter", from, to, p, plan_, status_);
  }
};

void modulated_conv2d(const irt_call& call, irt_plan& plan, irt_status& status) {
  Modulated m;
  if (const char* fault = modulated::read(call, m)) return fail(status, IRT_BAD_ARGUMENT, fault);
  Planner(m, call, plan, status).run();
}

}  // namespace

IRT_PLAN(modulated_conv2d)

}  // namespace irt::plan
