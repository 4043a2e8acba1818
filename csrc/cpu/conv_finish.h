// From sums to outputs: norm, bias, renormalisation by the mask, activation, gate and residual, on rows that are still
// in L1, and back to the tensor's layout.
#pragma once

#include <cmath>

#include "conv.h"

namespace irt::INPAINTRT_ISA::conv {

template <class T>
class Finish {
 public:
  explicit Finish(const Call& call)
      : call_(call), filters_(call), affine_(call.bias || call.scale || call.shift), partial_(call.ratio != nullptr) {}

  // `count` pixels, from `first` on, of row y of a unit of outputs; their sums as [pixel][lane], which are overwritten.
  // `gates` are those of a gated convolution.
  void operator()(int64_t b, int64_t unit, int64_t y, int64_t first, int64_t count, float* sums, float* gates) const {
    if (call_.style) {
      styled(b, unit, y, first, count, sums);
      return write(b, unit, y, first, count, sums);
    }
    if (partial_) {
      renormalise(b, unit, y, first, count, sums);
    } else if (affine_) {
      affine(call_.gated ? 2 * unit : unit, count, sums);
    }
    if (call_.gated) {
      if (affine_) affine(2 * unit + 1, count, gates);
      gate(count, sums, gates);
    } else if (!call_.residual_first || !call_.residual) {
      activate_row(count, sums);
    }
    write(b, unit, y, first, count, sums);
  }

 private:
  const Call& call_;
  Filters filters_;
  bool affine_, partial_;

  Vec vector_of(const irt_view* view, int64_t block, float absent) const {
    if (!view) return Vec(absent);
    const int64_t step = view->strides[0], first = filters_.first(block) * step, count = filters_.count(block);
    if (view->dtype == IRT_F32) return load_some(static_cast<const float*>(view->data) + first, count, step);
    return load_some(static_cast<const T*>(view->data) + first, count, step);
  }

  void affine(int64_t block, int64_t count, float* sums) const {
    const Vec shift = vector_of(call_.shift, block, 0.0f) + vector_of(call_.bias, block, 0.0f);
    if (call_.scale) {
      const Vec scale = vector_of(call_.scale, block, 1.0f);
      for (int64_t i = 0; i < count; ++i) store(sums + i * W, fma(load(sums + i * W), scale, shift));
    } else {
      for (int64_t i = 0; i < count; ++i) store(sums + i * W, load(sums + i * W) + shift);
    }
  }

  void styled(int64_t b, int64_t unit, int64_t y, int64_t first, int64_t count, float* sums) const {
    const Style& style = *call_.style;
    const int64_t o = filters_.first(unit), width = call_.width();
    const Vec bias = vector_of(call_.bias, unit, 0.0f), gain(style.gain), clamp(style.clamp), alpha(call_.alpha);
    const Vec scale =
        style.outputs ? load_some(style.outputs + b * call_.outputs() + o, filters_.count(unit)) : Vec(1.0f);
    const int64_t plane = style.planes == 1 ? 0 : b;
    const float* noise = style.noise ? style.noise + (plane * call_.height() + y) * width + first : nullptr;
    const bool bounded = style.clamp < INFINITY;
    with_activation(call_.act, [&](auto act) {
      for (int64_t i = 0; i < count; ++i) {
        const Vec shift = noise ? bias + Vec(noise[i]) : bias;
        const Vec v = gain * activate<decltype(act)::value>(fma(load(sums + i * W), scale, shift), alpha);
        store(sums + i * W, bounded ? at_most(clamp, at_least(Vec(0.0f) - clamp, v)) : v);
      }
    });
  }

  // u · (ratio · sums + bias), or ratio · sums; where nothing is valid that is 0 whatever they are.
  void renormalise(int64_t b, int64_t unit, int64_t y, int64_t first, int64_t count, float* sums) const {
    const int64_t at = (b * call_.height() + y) * call_.width() + first;
    const float *ratio = call_.ratio + at, *valid = call_.valid + at;
    const Vec bias = vector_of(call_.bias, unit, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Vec once = fma(load(sums + i * W), Vec(ratio[i]), bias);
      store(sums + i * W, valid[i] == 0.0f ? Vec(0.0f) : call_.bias ? once * Vec(valid[i]) : once);
    }
  }

  void gate(int64_t count, float* sums, const float* gates) const {
    const Vec alpha(call_.alpha), gain(call_.gain);
    with_activation(call_.act, [&](auto act) {
      for (int64_t i = 0; i < count; ++i) {
        const Vec features = activate<decltype(act)::value>(load(sums + i * W), alpha);
        store(sums + i * W, gain * features * sigmoid(load(gates + i * W)));
      }
    });
  }

  void activate_row(int64_t count, float* sums) const {
    if (call_.act == Act::none) return;
    const Vec alpha(call_.alpha);
    with_activation(call_.act, [&](auto act) {
      for (int64_t i = 0; i < count; ++i)
        store(sums + i * W, activate<decltype(act)::value>(load(sums + i * W), alpha));
    });
  }

  void write(int64_t b, int64_t unit, int64_t y, int64_t first, int64_t count, const float* sums) const {
    const Row<T> to = row_of<T>(*call_.out, b, unit, y, first);
    if (!call_.residual) return write_row(sums, count, Row<T>{}, to, [](Vec v, Vec) { return v; });
    const Row<T> extra = row_of<T>(*call_.residual, b, unit, y, first);
    if (!call_.residual_first) return write_row(sums, count, extra, to, [](Vec v, Vec more) { return v + more; });
    const Vec alpha(call_.alpha);
    with_activation(call_.act, [&](auto act) {
      write_row(sums, count, extra, to,
                [&](Vec v, Vec more) { return activate<decltype(act)::value>(v + more, alpha); });
    });
  }
};

}  // namespace irt::INPAINTRT_ISA::conv
