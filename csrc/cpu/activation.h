// The activations that every fused op offers, with their derivatives. Names and codes are the Python API's.
#pragma once

#include <cstring>

#include "simd.h"

namespace irt::INPAINTRT_ISA {

enum class Act { none, relu, leaky_relu, elu, silu, sigmoid, tanh };

static inline bool parse_activation(const char* name, Act& act) {
  static const char* const names[] = {"none", "relu", "leaky_relu", "elu", "silu", "sigmoid", "tanh"};
  for (int i = 0; i < 7; ++i) {
    if (strcmp(name, names[i]) == 0) {
      act = static_cast<Act>(i);
      return true;
    }
  }
  return false;
}

static inline float default_alpha(Act act) { return act == Act::leaky_relu ? 0.2f : 1.0f; }

template <Act act>
static inline Vec activate(Vec x, Vec alpha) {
  if constexpr (act == Act::relu) return at_least(Vec(0.0f), x);
  if constexpr (act == Act::leaky_relu) return if_positive(x, x, x * alpha);
  if constexpr (act == Act::elu) return if_positive(x, x, alpha * expm1(x));
  if constexpr (act == Act::silu) return x * sigmoid(x);
  if constexpr (act == Act::sigmoid) return sigmoid(x);
  if constexpr (act == Act::tanh) return tanh(x);
  return x;
}

template <Act act>
struct ActConstant {
  static constexpr Act value = act;
};

// visit(ActConstant<act>()), so that loops are compiled for one activation.
template <class Visit>
static inline void with_activation(Act act, const Visit& visit) {
  switch (act) {
    case Act::none: return visit(ActConstant<Act::none>());
    case Act::relu: return visit(ActConstant<Act::relu>());
    case Act::leaky_relu: return visit(ActConstant<Act::leaky_relu>());
    case Act::elu: return visit(ActConstant<Act::elu>());
    case Act::silu: return visit(ActConstant<Act::silu>());
    case Act::sigmoid: return visit(ActConstant<Act::sigmoid>());
    case Act::tanh: return visit(ActConstant<Act::tanh>());
  }
}

// act'(x), given also a = act(x). At 0 and NaN it is what torch takes: at 0 that of the negative side.
template <Act act>
static inline Vec activation_slope(Vec x, Vec a, Vec alpha) {
  const Vec one(1.0f);
  if constexpr (act == Act::relu) return if_at_most_zero(x, Vec(0.0f), one);
  if constexpr (act == Act::leaky_relu) return if_positive(x, one, alpha);
  if constexpr (act == Act::elu) return if_positive(x, one, alpha * exp(x));  // a + alpha would cancel
  if constexpr (act == Act::sigmoid) return a * (one - a);
  if constexpr (act == Act::tanh) return one - a * a;
  if constexpr (act == Act::silu) {
    const Vec s = sigmoid(x);
    return s * fma(x, one - s, one);
  }
  return one;
}

}  // namespace irt::INPAINTRT_ISA
