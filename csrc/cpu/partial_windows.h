// The windows of partial_conv2d with few valid pixels, computed once more by themselves.
//
// Winograd's rounding error is in proportion to a tile's values and is multiplied with the sum where little of a window
// is valid. Such windows lie at the borders of holes and are few: their outputs are overwritten by products of the
// windows as they are, in the direct form's order.
#pragma once

#include "conv_algorithms.h"
#include "partial_planes.h"

namespace irt::INPAINTRT_ISA {

template <class T>
class ThinWindows {
 public:
  ThinWindows(const conv::Call& call, const MaskPlanes<T>& planes)
      : call_(call), planes_(planes), at_once_(conv::windows_at_once(call)) {}

  size_t bytes(irt_status& status) const {
    Batch batch(call_, at_once_);
    size_t needed = 0;
    batch.call.needed = &needed;
    conv::columns(batch.call, status);
    return batch.floats() * sizeof(float) + needed;
  }

  // Of all images with chosen(image), whose outputs are there already.
  template <class Chosen>
  void compute(float* space, const Chosen& chosen, irt_status& status) const {
    Batch batch(call_, at_once_);
    batch.take(space);
    for (int64_t b = 0; b < call_.batch(); ++b) {
      if (!chosen(b)) continue;
      for (int64_t y = 0; y < call_.height(); ++y) {
        planes_.each_thin(b, y, [&](int64_t x) {
          const int64_t i = batch.count++, at = y * call_.width() + x;
          batch.places[i] = {b, y * call_.stride - call_.top, x * call_.stride - call_.left};
          batch.ratio[i] = planes_.ratio(b)[at], batch.valid[i] = planes_.valid(b)[at];
          if (batch.count == at_once_) flush(batch, status);
        });
      }
    }
    if (batch.count) flush(batch, status);
  }

 private:
  // Some windows as a call of the engine: an image of one row, whose outputs are put into the call's afterwards.
  struct Batch {
    conv::Call call;
    irt_view out;
    conv::Windows windows;
    int64_t at_once, count = 0;
    conv::Windows::Place* places = nullptr;
    float *ratio = nullptr, *valid = nullptr;

    Batch(const conv::Call& whole, int64_t windows_at_once)
        : call(whole), out(*whole.out), windows{nullptr, whole.dilation}, at_once(windows_at_once) {
      const int64_t outputs = whole.outputs();
      const bool last = whole.out->strides[1] == 1;  // channels
      const int64_t strides[] = {outputs * at_once, last ? 1 : at_once, outputs * at_once, last ? outputs : 1};
      memcpy(out.strides, strides, sizeof strides);
      out.sizes[0] = out.sizes[2] = 1, out.sizes[3] = at_once;
      call.out = &out, call.windows = &windows;
      call.stride = whole.kernel_width(), call.dilation = 1;
      call.top = call.left = call.bottom = call.right = 0;
    }
    void take(float* space) {
      windows.places = places = reinterpret_cast<conv::Windows::Place*>(space), space += place_floats();
      call.ratio = ratio = space, space += vectors(at_once);
      call.valid = valid = space, space += vectors(at_once);
      out.data = space, call.space = space + vectors(call.outputs() * at_once);
    }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    size_t floats() const {
      return static_cast<size_t>(place_floats() + 2 * vectors(at_once) + vectors(call.outputs() * at_once));
    }

   private:
    int64_t place_floats() const {
      return vectors(at_once * static_cast<int64_t>(sizeof(conv::Windows::Place) / sizeof(float)));
    }
  };

  const conv::Call& call_;
  const MaskPlanes<T>& planes_;
  int64_t at_once_;

  void flush(Batch& batch, irt_status& status) const {
    batch.out.sizes[3] = batch.count;
    conv::columns(batch.call, status);
    parallel_for(call_.outputs(), 64, call_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < batch.count; ++i) {
        const conv::Windows::Place& place = batch.places[i];
        const int64_t y = (place.y + call_.top) / call_.stride, x = (place.x + call_.left) / call_.stride;
        const irt_view& out = *call_.out;
        const T* from = static_cast<const T*>(batch.out.data) + i * batch.out.strides[3];
        T* to = static_cast<T*>(out.data) + place.b * out.strides[0] + y * out.strides[2] + x * out.strides[3];
        for (int64_t c = begin; c < end; ++c) to[c * out.strides[1]] = from[c * batch.out.strides[1]];
      }
    });
    batch.count = 0;
  }
};

}  // namespace irt::INPAINTRT_ISA
