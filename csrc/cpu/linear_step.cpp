// linear_step on the CPU: a sum of up to five tensors and noise, clamped, with the known region blended in, in one
// pass.
//
// Bound by memory without noise; with it, by Philox and Box and Muller (philox.h). As in sampler_step, groups of kGroup
// elements follow the elements' indices, and a group leaves out the noise that no pixel of it needs.
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "step_call.h"

namespace irt::INPAINTRT_ISA {
namespace {

// Elements that a thread is worth waking for: a sum of them takes some 20 us, a tenth of what noise takes.
constexpr int64_t kSumGrain = 32768, kNoiseGrain = 8192;
constexpr int kStepStream = 1, kKnownStream = 2;
constexpr int kMost = LinearCall::kMostTerms;

enum { kOut, kTerms, kKnown = kTerms + kMost, kMask, kNoise, kOperands };

template <class T>
class Sums {
 public:
  Sums(const LinearCall& call, const Samples<kOperands>& samples)
      : call_(call), samples_(samples), number_(call.number()) {
    for (int k = 0; k < kOperands; ++k) steps_[k] = samples.step(k);
    for (int k = 0; k < kTerms + call.count; ++k) dense_ = dense_ && steps_[k] == 1;
    if (call.known) dense_ = dense_ && steps_[kKnown] == 1 && steps_[kMask] == 1;
    if (call.noise) dense_ = dense_ && steps_[kNoise] == 1;
  }

  void run(int threads) const {
    parallel_for(samples_.total(), call_.seeds ? kNoiseGrain : kSumGrain, threads, [this](int64_t begin, int64_t end) {
      int64_t current = -1;
      float a[kMost + 3] = {};  // of the terms, of noise, of known, of its noise
      samples_.rows(begin, end, kGroup, [&](int64_t sample, int64_t index, const int64_t* at, int64_t n) {
        if (sample != current) {
          current = sample;
          for (int i = 0; i < call_.count; ++i) a[i] = table_entry(*call_.coefficients, sample, i);
          for (int i = 0; i < 3; ++i) a[kMost + i] = table_entry(*call_.coefficients, sample, call_.count + i);
        }
        if (dense_ && n == kGroup) {
          group<true>(a, sample, index, at, n);
        } else {
          group<false>(a, sample, index, at, n);
        }
      });
    });
  }

 private:
  static const T* data(const irt_view& view, int64_t offset) { return static_cast<const T*>(view.data) + offset; }

  template <bool kWhole>
  Vec take(const T* p, int operand, int i, int64_t n) const {
    const int64_t step = kWhole ? 1 : steps_[operand], left = n - i;
    return kWhole ? load(p + i) : load_some(p + i * step, left < Vec::kWidth ? left : Vec::kWidth, step);
  }

  template <bool kWhole>
  void draw(int64_t sample, int64_t index, int stream, Vec (&z)[4]) const {
    const int64_t seed = static_cast<const int64_t*>(call_.seeds->data)[sample * call_.seeds->strides[0]];
    philox_normals_at<kWhole>(Philox(seed, static_cast<uint32_t>(stream), number_), index, z);
  }

  template <bool kWhole>
  void group(const float (&a)[kMost + 3], int64_t sample, int64_t index, const int64_t* at, int64_t n) const {
    constexpr int W = Vec::kWidth;
    Vec mask[4], z[4], k[4];
    bool any_known = false, any_unknown = !call_.known;
    if (call_.known) {
      for (int j = 0; j < 4 && (kWhole || j * W < n); ++j) {
        mask[j] = take<kWhole>(data(*call_.mask, at[kMask]), kMask, j * W, n);
        any_known = any_known || any_other(mask[j], Vec(0.0f));
        any_unknown = any_unknown || any_other(mask[j], Vec(1.0f));
      }
    }
    if (call_.seeds) {
      if (any_unknown) draw<kWhole>(sample, index, kStepStream, z);
      if (any_known) draw<kWhole>(sample, index, kKnownStream, k);
    }
    const Vec clip(call_.clip), no_clip(-call_.clip);
    for (int j = 0; j < 4 && (kWhole || j * W < n); ++j) {
      const int i = j * W;
      Vec y = Vec(a[0]) * take<kWhole>(data(call_.terms[0], at[kTerms]), kTerms, i, n);
      for (int t = 1; t < call_.count; ++t) {
        y = y + Vec(a[t]) * take<kWhole>(data(call_.terms[t], at[kTerms + t]), kTerms + t, i, n);
      }
      if (call_.noise) {
        const T* const noise = data(*call_.noise, at[kNoise]);
        z[j] = take<kWhole>(noise, kNoise, i, n);
        if (call_.noise->sizes[0] == 2) k[j] = take<kWhole>(noise + call_.noise->strides[0], kNoise, i, n);
      }
      if (call_.noise || call_.seeds) y = y + Vec(a[kMost]) * z[j];
      y = at_most(clip, at_least(no_clip, y));
      if (call_.known) {
        Vec noised = Vec(a[kMost + 1]) * take<kWhole>(data(*call_.known, at[kKnown]), kKnown, i, n);
        if (call_.seeds || (call_.noise && call_.noise->sizes[0] == 2)) noised = noised + Vec(a[kMost + 2]) * k[j];
        y = mask[j] * noised + (Vec(1.0f) - mask[j]) * y;
      }
      T* const out = static_cast<T*>(call_.out->data) + at[kOut];
      if (kWhole) {
        store(out + i, y);
      } else {
        store_some(out + i * steps_[kOut], y, n - i < W ? n - i : W, steps_[kOut]);
      }
    }
  }

  const LinearCall& call_;
  const Samples<kOperands>& samples_;
  uint32_t number_;
  int64_t steps_[kOperands];
  bool dense_ = true;
};

void linear_step(const irt_call& given, irt_status& status) {
  LinearCall call;
  if (!call.read(given, status)) return;
  int64_t strides[kOperands][4] = {};
  broadcast_strides(*call.out, 0, strides[kOut]);
  for (int i = 0; i < call.count; ++i) broadcast_strides(call.terms[i], 0, strides[kTerms + i]);
  if (call.known) broadcast_strides(*call.known, 0, strides[kKnown]);
  if (call.mask) broadcast_strides(*call.mask, 0, strides[kMask]);
  if (call.noise) broadcast_strides(*call.noise, 1, strides[kNoise]);
  const Samples<kOperands> samples(call.out->sizes, strides);
  if (samples.total() == 0) return;
  switch (call.out->dtype) {
    case IRT_F32: return Sums<float>(call, samples).run(given.threads);
    case IRT_BF16: return Sums<bf16>(call, samples).run(given.threads);
    case IRT_F16: return Sums<f16>(call, samples).run(given.threads);
    default: return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

IRT_CPU_KERNEL(linear_step)

}  // namespace irt::INPAINTRT_ISA
