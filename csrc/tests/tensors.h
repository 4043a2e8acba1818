// Tensors for tests: any strides, inside memory that ends where the tensor ends (so that AddressSanitizer sees the next
// byte), with canaries before and between the elements. Values are kept as double; storage is written and read by the
// definition of the formats, not by the library's conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "inpaintrt/abi.h"

namespace {

constexpr unsigned char kCanary = 0xff;  // as a number of any of the formats: NaN

inline int64_t bytes_of(int dtype) { return dtype == IRT_F32 ? 4 : 2; }

// 1 + the number of explicit fraction bits, and the exponent of the smallest normal number.
inline int precision_of(int dtype) { return dtype == IRT_F32 ? 24 : dtype == IRT_F16 ? 11 : 8; }
inline int low_exponent_of(int dtype) { return dtype == IRT_F16 ? -14 : -126; }

// What rounding x to the format moves it by, at most.
inline double half_unit(double x, int dtype) {
  int exponent = 0;
  if (x != 0.0) std::frexp(x, &exponent);
  const int low = low_exponent_of(dtype);
  return std::ldexp(1.0, (x != 0.0 && exponent - 1 > low ? exponent - 1 : low) - precision_of(dtype));
}

// The bfloat16 next to x, of two the one whose last bit is 0; for x of normal size.
inline double rounded_to_bf16(double x) {
  int exponent = 0;
  const double part = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(part, 8)), exponent - 8);
}

// `x` must be representable, or infinite or NaN.
inline void encode(double x, int dtype, unsigned char* at) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (dtype == IRT_F16) {
    const uint32_t sign = bits >> 16 & 0x8000u;
    int exponent = 0;
    const double part = std::frexp(std::fabs(x), &exponent);  // x = part · 2^exponent, part in [0.5, 1)
    if (std::isnan(x)) {
      bits = 0x7e00u;
    } else if (std::isinf(x)) {
      bits = sign | 0x7c00u;
    } else if (x == 0.0) {
      bits = sign;
    } else {
      bits = sign + (static_cast<uint32_t>(exponent + 13) << 10) +
             static_cast<uint32_t>(part * 2048.0);  // 1024 is implied
    }
  } else if (dtype == IRT_BF16) {
    bits >>= 16;
  }
  memcpy(at, &bits, static_cast<size_t>(bytes_of(dtype)));
}

inline double decode(int dtype, const unsigned char* at) {
  uint32_t bits = 0;
  memcpy(&bits, at, static_cast<size_t>(bytes_of(dtype)));
  if (dtype == IRT_F16) {
    const int exponent = bits >> 10 & 31;
    const double fraction = bits & 1023, sign = bits & 0x8000u ? -1.0 : 1.0;
    if (exponent == 31) return fraction != 0.0 ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0 + fraction, exponent - 25) : std::ldexp(fraction, -24));
  }
  if (dtype == IRT_BF16) bits <<= 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct Shape {
  int64_t sizes[4];
  int64_t count() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

enum class Memory { nchw, nhwc, random, expanded };  // expanded: some dimension of stride 0

class Tensor {
 public:
  Tensor(Random& random, int dtype, const Shape& shape, Memory memory) : shape_(shape) {
    static const int nchw[] = {3, 2, 1, 0}, nhwc[] = {1, 3, 2, 0};
    int order[4];  // innermost first
    memcpy(order, memory == Memory::nhwc ? nhwc : nchw, sizeof order);
    const bool regular = memory == Memory::nchw || memory == Memory::nhwc;
    for (int d = 3; d > 0 && !regular; --d) {
      const int64_t other = random.between(0, d);
      const int kept = order[d];
      order[d] = order[other];
      order[other] = kept;
    }
    view_.dtype = dtype;
    view_.ndim = 4;
    int64_t stride = regular ? 1 : random.between(1, 2), last = 0;
    for (int d : order) {
      const int64_t size = shape.sizes[d];
      view_.sizes[d] = size;
      view_.strides[d] = memory == Memory::expanded && d != 1 && random.between(0, 1) ? 0 : stride;
      if (size > 1) last += (size - 1) * view_.strides[d];
      if (view_.strides[d]) stride *= size > 1 ? size : 1;
      if (!regular && random.between(0, 1)) stride += random.between(0, 3);
    }
    const int64_t before = random.between(0, 3);  // elements: no alignment but the element's own
    bytes_ = shape.count() ? (before + last + 1) * bytes_of(dtype) : 0;
    if (!bytes_) return;  // an empty tensor has no memory at all
    memory_ = static_cast<unsigned char*>(malloc(static_cast<size_t>(bytes_)));
    memset(memory_, kCanary, static_cast<size_t>(bytes_));
    view_.data = memory_ + before * bytes_of(dtype);
  }
  ~Tensor() { free(memory_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const irt_view& view() const { return view_; }
  double get(int64_t b, int64_t c, int64_t h, int64_t w) const { return decode(view_.dtype, at(b, c, h, w)); }
  void set(int64_t b, int64_t c, int64_t h, int64_t w, double x) { encode(x, view_.dtype, at(b, c, h, w)); }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t b = 0; b < shape_.sizes[0]; ++b) {
      for (int64_t c = 0; c < shape_.sizes[1]; ++c) {
        for (int64_t h = 0; h < shape_.sizes[2]; ++h) {
          for (int64_t w = 0; w < shape_.sizes[3]; ++w) visit(b, c, h, w);
        }
      }
    }
  }

  // Numbers that all formats represent: m · 2^e with |m| < 128 and e in [-8, -3]. With `more` bits, only float32 does.
  void fill(Random& random, int more = 0) {
    const int64_t most = (int64_t{128} << more) - 1;
    for_each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
      const auto m = static_cast<double>(random.between(-most, most));
      set(b, c, h, w, std::ldexp(m, static_cast<int>(random.between(-8, -3)) - more));
    });
  }

  // Whether every byte that belongs to no element is as it was.
  bool canaries_live() const {
    std::vector<bool> ours(static_cast<size_t>(bytes_), false);
    for_each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
      const auto start = static_cast<size_t>(at(b, c, h, w) - memory_);
      for (size_t i = 0; i < static_cast<size_t>(bytes_of(view_.dtype)); ++i) ours[start + i] = true;
    });
    for (size_t i = 0; i < ours.size(); ++i) {
      if (!ours[i] && memory_[i] != kCanary) return false;
    }
    return true;
  }
  std::vector<unsigned char> bytes() const { return {memory_, memory_ + bytes_}; }

 private:
  unsigned char* at(int64_t b, int64_t c, int64_t h, int64_t w) const {
    const int64_t* s = view_.strides;
    const int64_t element = b * s[0] + c * s[1] + h * s[2] + w * s[3];
    return static_cast<unsigned char*>(view_.data) + element * bytes_of(view_.dtype);
  }

  Shape shape_;
  irt_view view_{};
  unsigned char* memory_ = nullptr;
  int64_t bytes_ = 0;
};

inline irt_value value(const irt_view& v) {
  irt_value made{IRT_TENSOR, 1, {}};
  made.tensors = &v;
  return made;
}
inline irt_value list(const irt_view& first, int32_t count) {
  irt_value made{IRT_TENSORS, count, {}};
  made.tensors = &first;
  return made;
}
inline irt_value value(const char* s) {
  irt_value made{IRT_STRING, 1, {}};
  made.s = s;
  return made;
}
inline irt_value value(double f) {
  irt_value made{IRT_FLOAT, 1, {}};
  made.f = f;
  return made;
}
inline irt_value list(const int64_t* first, int32_t count) {
  irt_value made{IRT_INTS, count, {}};
  made.ints = first;
  return made;
}
inline irt_value none() { return {IRT_NONE, 1, {}}; }

inline irt_call call_of(const irt_value* args, int nargs, const irt_view* outs, int nouts, int threads) {
  irt_call call{};
  call.args = args;
  call.nargs = nargs;
  call.outs = outs;
  call.nouts = nouts;
  call.threads = threads;
  call.device = -1;
  return call;
}

}  // namespace
