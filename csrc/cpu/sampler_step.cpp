// sampler_step on the CPU: prediction, posterior, noise, undo steps and the known region in one pass.
//
// Two thirds of the arithmetic is the noise, which a pixel needs once: the step's where it is unknown, the known
// region's where it is known, both only where the mask is a fraction. A group of kGroup elements leaves out what no
// pixel of it needs. Noise goes by an element's index in its sample, so the loop follows indices, not memory: layouts
// other than contiguous samples are gathered, correct but not fast.
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "step_call.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t kGrain = 4096;  // elements a thread is worth waking for
constexpr int kStepStream = 1, kKnownStream = 2;

enum { kNext, kClean, kX, kModel, kKnown, kMask, kNoise, kGuidance, kOperands };

// A sample's coefficients, as the reference computes them in float32.
struct Coefficients {
  float sqrt_recip, sqrt_recipm1, coef_x0, coef_x, min_log, max_log, nonzero, undo_scale, undo_var, known_scale,
      known_sigma;
  bool blend;

  Coefficients() = default;
  Coefficients(const irt_view& row, int64_t sample) {
    const auto at = [&](int entry) { return table_entry(row, sample, entry); };
    sqrt_recip = at(kSqrtRecip), sqrt_recipm1 = at(kSqrtRecipM1), coef_x0 = at(kCoefX0), coef_x = at(kCoefX);
    min_log = at(kMinLog), max_log = at(kMaxLog), nonzero = at(kNonzero);
    undo_scale = at(kUndoScale), undo_var = at(kUndoVar), known_scale = at(kKnownScale), known_sigma = at(kKnownSigma);
    blend = at(kBlend) != 0.0f;
  }
};

template <class T>
class Steps {
 public:
  Steps(const SamplerCall& call, const Samples<kOperands>& samples)
      : call_(call), samples_(samples), number_(call.number()) {
    for (int k = 0; k < kOperands; ++k) steps_[k] = samples.step(k);
    const bool present[] = {true,
                            true,
                            true,
                            true,
                            call.known != nullptr,
                            call.mask != nullptr,
                            call.noise != nullptr,
                            call.guidance != nullptr};
    for (int k = 0; k < kOperands; ++k) dense_ = dense_ && (!present[k] || steps_[k] == 1);
  }

  void run(int threads) const {
    parallel_for(samples_.total(), kGrain, threads, [this](int64_t begin, int64_t end) {
      int64_t current = -1;
      Coefficients c{};
      samples_.rows(begin, end, kGroup, [&](int64_t sample, int64_t index, const int64_t* at, int64_t n) {
        if (sample != current) c = Coefficients(*call_.row, current = sample);
        if (dense_ && n == kGroup) {
          group<true>(c, sample, index, at, n);
        } else {
          group<false>(c, sample, index, at, n);
        }
      });
    });
  }

 private:
  template <class Number>
  static const Number* data(const irt_view* view, int64_t offset) {
    return static_cast<const Number*>(view->data) + offset;
  }
  template <bool kWhole, class Number>
  Vec take(const Number* p, int operand, int i, int64_t n) const {
    const int64_t step = kWhole ? 1 : steps_[operand], left = n - i;
    return kWhole ? load(p + i) : load_some(p + i * step, left < Vec::kWidth ? left : Vec::kWidth, step);
  }

  template <bool kWhole>
  void draw(int64_t sample, int64_t index, int stream, Vec (&z)[4]) const {
    const int64_t seed = *data<int64_t>(call_.seeds, sample * call_.seeds->strides[0]);
    philox_normals_at<kWhole>(Philox(seed, static_cast<uint32_t>(stream), number_), index, z);
  }

  template <bool kWhole>
  void group(const Coefficients& c, int64_t sample, int64_t index, const int64_t* at, int64_t n) const {
    constexpr int W = Vec::kWidth;
    const bool blend = call_.known && c.blend, learned = call_.variance != Variance::fixed;
    Vec mask[4], z[4], k[4];
    bool any_known = false, any_unknown = !blend;
    if (blend) {
      for (int j = 0; j < 4 && (kWhole || j * W < n); ++j) {
        mask[j] = take<kWhole>(data<float>(call_.mask, at[kMask]), kMask, j * W, n);
        any_known = any_known || any_other(mask[j], Vec(0.0f));
        any_unknown = any_unknown || any_other(mask[j], Vec(1.0f));
      }
    }
    if (call_.seeds) {
      if (any_unknown) draw<kWhole>(sample, index, kStepStream, z);
      if (any_known) draw<kWhole>(sample, index, kKnownStream, k);
    }
    const float* const x = data<float>(call_.x, at[kX]);
    const T* const made = data<T>(call_.model, at[kModel]);
    const T* const variances = made + call_.x->sizes[1] * call_.model->strides[1];
    const Vec clip(call_.clip), no_clip(-call_.clip), one(1.0f), half(0.5f);
    for (int j = 0; j < 4 && (kWhole || j * W < n); ++j) {
      const int i = j * W;
      const Vec now = take<kWhole>(x, kX, i, n), m = take<kWhole>(made, kModel, i, n);
      Vec x0 = m;
      if (call_.prediction == Prediction::epsilon) x0 = Vec(c.sqrt_recip) * now - Vec(c.sqrt_recipm1) * m;
      if (call_.prediction == Prediction::v) x0 = (now - Vec(c.sqrt_recipm1) * m) / Vec(c.sqrt_recip);
      x0 = at_most(clip, at_least(no_clip, x0));
      Vec log_variance(c.min_log);
      if (learned) log_variance = take<kWhole>(variances, kModel, i, n);
      if (call_.variance == Variance::learned_range) {
        const Vec share = (log_variance + one) * half;
        log_variance = share * Vec(c.max_log) + (one - share) * Vec(c.min_log);
      }
      Vec y = Vec(c.coef_x0) * x0 + Vec(c.coef_x) * now;
      if (call_.guidance) {
        y = y + exp(log_variance) * take<kWhole>(data<float>(call_.guidance, at[kGuidance]), kGuidance, i, n);
      }
      if (call_.seeds) {
        const Vec spread = Vec(c.nonzero * c.undo_scale * c.undo_scale) * exp(log_variance) + Vec(c.undo_var);
        y = Vec(c.undo_scale) * y + square_root(spread) * z[j];
      } else {
        const float* const noise = data<float>(call_.noise, at[kNoise]);
        const int64_t next = call_.noise->strides[0];
        y = y + Vec(c.nonzero) * exp(half * log_variance) * take<kWhole>(noise, kNoise, i, n);
        if (call_.noise->sizes[0] == 3) {
          y = Vec(c.undo_scale) * y + Vec(std::sqrt(c.undo_var)) * take<kWhole>(noise + next, kNoise, i, n);
          if (blend) k[j] = take<kWhole>(noise + 2 * next, kNoise, i, n);
        }
      }
      if (blend) {
        const Vec known = take<kWhole>(data<float>(call_.known, at[kKnown]), kKnown, i, n);
        const Vec noised = Vec(c.known_scale) * known + Vec(c.known_sigma) * k[j];
        y = mask[j] * noised + (one - mask[j]) * y;
      }
      put<kWhole>(call_.next, at[kNext], kNext, i, n, y);
      put<kWhole>(call_.clean, at[kClean], kClean, i, n, x0);
    }
  }

  template <bool kWhole>
  void put(const irt_view* view, int64_t offset, int operand, int i, int64_t n, Vec value) const {
    float* const out = static_cast<float*>(view->data) + offset;
    const int64_t step = kWhole ? 1 : steps_[operand], left = n - i;
    if (kWhole) return store(out + i, value);
    store_some(out + i * step, value, left < Vec::kWidth ? left : Vec::kWidth, step);
  }

  const SamplerCall& call_;
  const Samples<kOperands>& samples_;
  uint32_t number_;
  int64_t steps_[kOperands];
  bool dense_ = true;
};

void sampler_step(const irt_call& given, irt_status& status) {
  SamplerCall call;
  if (!call.read(given, status)) return;
  int64_t strides[kOperands][4] = {};
  const irt_view* const images[] = {call.next, call.clean, call.x, call.model, call.known, call.mask};
  for (int k = 0; k < 6; ++k) {
    if (images[k]) broadcast_strides(*images[k], 0, strides[k]);
  }
  if (call.noise) broadcast_strides(*call.noise, 1, strides[kNoise]);
  if (call.guidance) broadcast_strides(*call.guidance, 0, strides[kGuidance]);
  const Samples<kOperands> samples(call.x->sizes, strides);
  if (samples.total() == 0) return;
  switch (call.model->dtype) {
    case IRT_F32: return Steps<float>(call, samples).run(given.threads);
    case IRT_BF16: return Steps<bf16>(call, samples).run(given.threads);
    case IRT_F16: return Steps<f16>(call, samples).run(given.threads);
    default: return fail(status, IRT_UNSUPPORTED, "dtype of model_output must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(sampler_step)

}  // namespace irt::INPAINTRT_ISA
