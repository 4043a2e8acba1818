// The calls of sampler_step and linear_step, read and checked: for the CPU kernels and the launch plans alike.
#pragma once

#include "kernel.h"
#include "samples.h"

namespace irt::INPAINTRT_ISA {

// An optional tensor: null where it is absent. False, with a status, where it is something else.
static inline bool optional_tensor(const irt_call& call, int index, const irt_view*& view, irt_status& status) {
  view = nullptr;
  if (call.args[index].kind == IRT_NONE) return true;
  view = tensor_arg(call, index, status);
  return view != nullptr;
}

// What both ops draw with and blend in.
struct StepArguments {
  const irt_view *known, *mask, *noise, *seeds, *counter;
  uint32_t call;

  // `image` is what all are shaped as; `dtype` that of known, mask and noise.
  bool read(const irt_call& c, const int (&at)[6], const irt_view& image, int32_t dtype, int most, irt_status& status) {
    const irt_view** const views[] = {&known, &mask, &noise, &seeds, &counter};
    for (int i = 0; i < 5; ++i) {
      if (!optional_tensor(c, at[i], *views[i], status)) return false;
    }
    const irt_value& number = c.args[at[5]];
    bool good = number.kind == IRT_INT && number.i >= 0 && number.i <= 0xffffffffll && !known == !mask;
    call = good ? static_cast<uint32_t>(number.i) : 0;
    good = good && (!known || fits_image(*known, image, dtype, true, false));
    good = good && (!mask || fits_image(*mask, image, dtype, true, true));
    good = good && (!seeds || (seeds->dtype == IRT_I64 && seeds->ndim == 1 && seeds->sizes[0] == image.sizes[0]));
    good = good && (!counter || (counter->ndim == 0 && (counter->dtype == IRT_I32 || counter->dtype == IRT_I64)));
    good = good && !(noise && seeds);
    if (good && noise) {
      good = noise->dtype == dtype && noise->ndim == 5 && noise->sizes[0] >= 1 && noise->sizes[0] <= most &&
             !memcmp(noise->sizes + 1, image.sizes, 4 * sizeof image.sizes[0]);
    }
    if (!good) {
      fail(status, IRT_BAD_ARGUMENT,
           "known, mask, noise, seeds or call does not fit: (1|B, C, H, W), (1|B, 1|C, H, W), (n, B, C, H, W), (B,) "
           "int64, "
           "32 bits");
    }
    return good;
  }

  // The number of this call, where the counter is in this memory.
  uint32_t number() const {
    if (!counter) return call;
    return static_cast<uint32_t>(counter->dtype == IRT_I32 ? *static_cast<const int32_t*>(counter->data)
                                                           : *static_cast<const int64_t*>(counter->data));
  }
};

static inline bool same_image(const irt_view& a, const irt_view& b) {
  return a.ndim == 4 && b.ndim == 4 && !memcmp(a.sizes, b.sizes, 4 * sizeof a.sizes[0]);
}

// float32 coefficients, (n,) or (B, n).
static inline bool fits_table(const irt_view& table, int64_t batch, int64_t entries) {
  const bool each = table.ndim == 2 && table.sizes[0] == batch && table.sizes[1] == entries;
  return table.dtype == IRT_F32 && (each || (table.ndim == 1 && table.sizes[0] == entries));
}
// Coefficient `entry` of a sample.
static inline float table_entry(const irt_view& table, int64_t sample, int64_t entry) {
  const int64_t at = table.ndim == 2 ? sample * table.strides[0] + entry * table.strides[1] : entry * table.strides[0];
  return static_cast<const float*>(table.data)[at];
}

enum class Prediction { epsilon, x0, v };
enum class Variance { learned_range, learned, fixed };
enum Entry {  // of a row of sampler_step; the rest is for its caller
  kSqrtRecip,
  kSqrtRecipM1,
  kCoefX0,
  kCoefX,
  kMinLog,
  kMaxLog,
  kNonzero,
  kUndoScale,
  kUndoVar,
  kKnownScale,
  kKnownSigma,
  kBlend,
  kEntries = 16
};

static inline int named(const irt_value& value, const char* const (&names)[3]) {
  for (int i = 0; i < 3 && value.kind == IRT_STRING; ++i) {
    if (strcmp(value.s, names[i]) == 0) return i;
  }
  return -1;
}

// (x, model_output, row, known, mask, noise, seeds, call, counter, prediction, variance, clip, guidance) -> next, x0
struct SamplerCall : StepArguments {
  const irt_view *x, *model, *row, *guidance, *next, *clean;
  Prediction prediction;
  Variance variance;
  float clip;  // infinite: none

  bool read(const irt_call& c, irt_status& status) {
    if (c.nargs != 13 || c.nouts != 2) {
      fail(status, IRT_BAD_ARGUMENT,
           "expected (x, model_output, row, known, mask, noise, seeds, call, counter, prediction, variance, clip, "
           "guidance) and "
           "two outputs");
      return false;
    }
    x = tensor_arg(c, 0, status);
    model = x ? tensor_arg(c, 1, status) : nullptr;
    row = model ? tensor_arg(c, 2, status) : nullptr;
    if (!row || !optional_tensor(c, 12, guidance, status)) return false;
    next = &c.outs[0];
    clean = &c.outs[1];
    const int predicted = named(c.args[9], {"epsilon", "x0", "v"});
    const int varied = named(c.args[10], {"learned_range", "learned", "fixed"});
    bool good = predicted >= 0 && varied >= 0 && is_number_or_none(c.args[11]);
    good = good && x->dtype == IRT_F32 && next->dtype == IRT_F32 && clean->dtype == IRT_F32;
    good = good && same_image(*x, *next) && same_image(*x, *clean) && fits_table(*row, x->sizes[0], kEntries);
    good = good && (!guidance || (guidance->dtype == IRT_F32 && same_image(*guidance, *x)));
    good = good && model->ndim == 4 && model->sizes[0] == x->sizes[0] && model->sizes[2] == x->sizes[2] &&
           model->sizes[3] == x->sizes[3] && model->sizes[1] == x->sizes[1] * (varied == 2 ? 1 : 2);
    if (!good) {
      fail(status, IRT_BAD_ARGUMENT,
           "expected float32 images x, next and x0 (B, C, H, W), model_output (B, 2C, H, W), or (B, C, H, W) with "
           "variance "
           "\"fixed\", row (16,) or (B, 16), a prediction, a variance, and a number or None for clip");
      return false;
    }
    prediction = static_cast<Prediction>(predicted);
    variance = static_cast<Variance>(varied);
    clip = static_cast<float>(float_arg(c.args[11], __builtin_inff()));
    if (!StepArguments::read(c, {3, 4, 5, 6, 8, 7}, *x, IRT_F32, 3, status)) return false;
    if (!noise == !seeds || (noise && noise->sizes[0] == 2) || (noise && noise->sizes[0] == 1 && known)) {
      fail(status, IRT_BAD_ARGUMENT, "expected seeds, or noise of three, or noise of one without known");
      return false;
    }
    return true;
  }
};

// (terms, coefficients, noise, seeds, call, counter, clip, known, mask) -> out
struct LinearCall : StepArguments {
  static constexpr int kMostTerms = 5;

  const irt_view *terms, *coefficients, *out;
  int count;
  float clip;

  bool read(const irt_call& c, irt_status& status) {
    bool good = c.nargs == 9 && c.nouts == 1 && c.args[0].kind == IRT_TENSORS && c.args[0].count >= 1 &&
                c.args[0].count <= kMostTerms && c.args[1].kind == IRT_TENSOR && is_number_or_none(c.args[6]);
    if (good) {
      terms = c.args[0].tensors;
      count = c.args[0].count;
      coefficients = c.args[1].tensors;
      out = c.outs;
      clip = static_cast<float>(float_arg(c.args[6], __builtin_inff()));
      good = out->ndim == 4 && fits_table(*coefficients, out->sizes[0], count + 3);
      for (int i = 0; i < count; ++i) good = good && terms[i].dtype == out->dtype && same_image(terms[i], *out);
    }
    if (!good) {
      fail(status, IRT_BAD_ARGUMENT,
           "expected (terms, coefficients, noise, seeds, call, counter, clip, known, mask) and one output: 1 to 5 "
           "terms (B, C, "
           "H, W) of the output's dtype, n + 3 float32 coefficients");
      return false;
    }
    return StepArguments::read(c, {7, 8, 2, 3, 5, 4}, *out, out->dtype, 2, status);
  }
};

}  // namespace irt::INPAINTRT_ISA
