// Calls of the convolution ops that are wrong in one place, that claim sizes beyond all memory, or that the system has
// no memory for: each is answered with a status and touches nothing. And calls with strides that mean nothing, which
// are right.
#include <climits>
#include <functional>
#include <vector>

#include "convolution.h"
#include "guarded_workspace.h"

namespace {

constexpr int64_t kMax = INT64_MAX, kMin = INT64_MIN;
constexpr int64_t kOne = 1;
const Op kAll[] = {Op::fused, Op::gated, Op::partial};

// A correct call of an op with everything present.
Setting correct(Op op, int dtype = IRT_F32) {
  Setting s;
  s.op = op, s.dtype = dtype, s.b = 2, s.inputs = 3, s.outputs = 2, s.h = 5, s.w = 6, s.kh = s.kw = 3, s.pad(1);
  s.bias = true;
  if (op == Op::fused) s.scale = s.shift = true, s.residual = Residual::after;
  if (op != Op::gated) s.mask_images = 2, s.mask_channels = 3;
  return s;
}

struct Subject {
  Convolution convolution;
  Convolution::Arguments a;
  irt_call call;
  int64_t pads[5] = {1, 1, 1, 1, 1};
  irt_view second{};

  explicit Subject(Random& random, const Setting& s) : convolution(random, s), a(convolution) {
    call = call_of(a.values.data(), a.count(), a.outs, s.op == Op::partial ? 2 : 1, 2);
    a.values[padding()].ints = pads;
  }
  Op op() const { return convolution.s.op; }
  size_t weight() const { return op() == Op::partial ? 2 : 1; }
  size_t bias() const { return weight() + 1; }
  size_t stride() const { return weight() + 2; }
  size_t padding() const { return weight() + 3; }
  size_t dilation() const { return weight() + 4; }
  size_t mask() const { return op() == Op::partial ? 1 : 8; }
  size_t activation() const { return op() == Op::gated ? 7 : 14; }
  irt_view& view(size_t i) { return const_cast<irt_view&>(*a.values[i].tensors); }

  // The status of the call; outputs may only have changed when it is OK.
  irt_status answer(const char* what) {
    const std::vector<unsigned char> out = convolution.out->bytes();
    const std::vector<unsigned char> updated = convolution.updated ? convolution.updated->bytes() : out;
    irt_status status;
    memset(&status, 0x7e, sizeof status);
    irt_cpu_find(kOps[static_cast<int>(op())])(&call, &status);
    CHECK(status.code == IRT_OK || convolution.out->bytes() == out, "%s: the output changed beside an error", what);
    CHECK(status.code == IRT_OK || !convolution.updated || convolution.updated->bytes() == updated,
          "%s: the updated mask changed beside an error", what);
    CHECK(status.code >= IRT_OK && status.code <= IRT_DEVICE_ERROR, "%s: status %d", what, status.code);
    CHECK(memchr(status.message, 0, sizeof status.message), "%s: a message without an end", what);
    return status;
  }
};

struct Fault {
  const char* name;
  std::function<void(Subject&)> apply;
  int code = IRT_BAD_ARGUMENT;
};

void set_int(irt_value& value, int64_t i) { value.kind = IRT_INT, value.i = i; }

std::vector<Fault> faults_of(Op op) {
  std::vector<Fault> all;
  const auto add = [&all](const char* name, std::function<void(Subject&)> apply, int code = IRT_BAD_ARGUMENT) {
    all.push_back({name, std::move(apply), code});
  };
  const size_t count = op == Op::fused ? 20 : op == Op::gated ? 10 : 9;
  for (int n : {0, 1, static_cast<int>(count) - 1, static_cast<int>(count) + 1, -1, INT_MIN}) {
    add("number of arguments", [n](Subject& s) { s.call.nargs = n; });
  }
  for (int n : {0, 3, -1, INT_MIN}) add("number of outputs", [n](Subject& s) { s.call.nouts = n; });
  add("null arguments", [](Subject& s) { s.call.args = nullptr; });
  add("null outputs", [](Subject& s) { s.call.outs = nullptr; });
  for (size_t i = 0; i < count; ++i) {
    for (int kind : {-1, 7, INT_MAX}) add("unknown kind", [i, kind](Subject& s) { s.a.values[i].kind = kind; });
  }

  // ---- tensors: x, the weight, and whichever of the others the op has
  const auto tensors = [op](Subject& s) {
    std::vector<size_t> places = {0, s.weight(), s.bias()};
    if (op != Op::gated) places.push_back(s.mask());
    if (op == Op::fused) places.insert(places.end(), {12, 13, 16});
    return places;
  };
  for (size_t k = 0; k < (op == Op::fused ? 7u : op == Op::gated ? 3u : 4u); ++k) {
    const auto of = [tensors, k](std::function<void(irt_view&)> f) {
      return [tensors, k, f](Subject& s) { f(s.view(tensors(s)[k])); };
    };
    add("null data", of([](irt_view& v) { v.data = nullptr; }));
    for (int dtype : {int{IRT_F16}, int{IRT_BF16}, int{IRT_F64}, int{IRT_U8}, -1, 8}) {
      add("another dtype", of([dtype](irt_view& v) { v.dtype = dtype; }));
    }
    for (int ndim : {-1, 0, 2, 3, 5, 7, INT_MAX}) add("rank", of([ndim](irt_view& v) { v.ndim = ndim; }));
    for (int d = 0; d < 4; ++d) {
      for (int64_t size : {int64_t{0}, int64_t{-1}, int64_t{7}, int64_t{9}, kMax, kMin, kOne << 40}) {
        add("size", [tensors, k, d, size](Subject& s) {
          irt_view& v = s.view(tensors(s)[k]);
          d < v.ndim ? v.sizes[d] = size : v.ndim = 3;  // vectors have one size
        });
      }
    }
    for (int64_t stride : {kMax, kMin, kMin + 1}) {
      add("stride", of([stride](irt_view& v) { v.strides[0] = stride; }));
    }
  }
  add("absent x", [](Subject& s) { s.a.values[0] = none(); });
  add("absent weight", [](Subject& s) { s.a.values[s.weight()] = none(); });
  if (op == Op::partial) add("absent mask", [](Subject& s) { s.a.values[s.mask()] = none(); });
  add("list for x", [](Subject& s) { s.a.values[0].kind = IRT_TENSORS; });
  add("null x", [](Subject& s) { s.a.values[0].tensors = nullptr; });
  add("the weight of no filters", [](Subject& s) { s.view(s.weight()).sizes[0] = 0; });
  for (int d : {2, 3})
    add("a kernel of 65", [d](Subject& s) { s.view(s.weight()).sizes[d] = 65, s.view(s.weight()).strides[d] = 0; });

  // ---- the output
  for (int d = 0; d < 4; ++d) {
    for (int64_t by : {-1, 1}) add("size of the output", [d, by](Subject& s) { s.a.outs[0].sizes[d] += by; });
  }
  for (int ndim : {-1, 0, 3, 5, 7}) add("rank of the output", [ndim](Subject& s) { s.a.outs[0].ndim = ndim; });
  for (int dtype : {IRT_F16, IRT_BF16, IRT_I32})
    add("dtype of the output", [dtype](Subject& s) { s.a.outs[0].dtype = dtype; });
  if (op == Op::partial) {
    for (int d = 0; d < 4; ++d) add("size of the updated mask", [d](Subject& s) { ++s.a.outs[1].sizes[d]; });
    add("dtype of the updated mask", [](Subject& s) { s.a.outs[1].dtype = IRT_BF16; });
    add("rank of the updated mask", [](Subject& s) { s.a.outs[1].ndim = 3; });
    add("unknown scale", [](Subject& s) { s.a.values[7] = value("two"); });
    add("no number for eps", [](Subject& s) { s.a.values[8] = value("1"); });
  }

  // ---- geometry
  for (int64_t stride : {int64_t{0}, int64_t{-1}, int64_t{2}, int64_t{9}, kMax, kMin}) {
    add("stride", [stride](Subject& s) { set_int(s.a.values[s.stride()], stride); });
  }
  for (int64_t dilation : {int64_t{0}, int64_t{-1}, int64_t{2}, kOne << 41, kMax / 2, kMax, kMin}) {
    add("dilation", [dilation](Subject& s) { set_int(s.a.values[s.dilation()], dilation); });
  }
  for (int side = 0; side < 4; ++side) {
    for (int64_t pad : {int64_t{-1}, int64_t{2}, kOne << 40, kMax / 2, kMax, kMin}) {
      add("padding", [side, pad](Subject& s) { s.pads[side] = pad; });
    }
  }
  for (int32_t n : {0, 2, 3, 5, -1}) add("number of sides", [n](Subject& s) { s.a.values[s.padding()].count = n; });
  add("one number for padding", [](Subject& s) { set_int(s.a.values[s.padding()], 1); });
  add("null padding", [](Subject& s) { s.a.values[s.padding()].ints = nullptr; });
  add("a real stride", [](Subject& s) { s.a.values[s.stride()] = value(1.0); });
  add("a real dilation", [](Subject& s) { s.a.values[s.dilation()] = value(1.0); });
  if (op == Op::partial) return all;

  // ---- what partial_conv2d does not have
  const size_t mode = op == Op::gated ? 6 : 7;
  for (const char* name : {"", "circular", "reflects"})
    add("unknown mode", [=](Subject& s) { s.a.values[mode] = value(name); });
  add("a number for the mode", [=](Subject& s) { s.a.values[mode] = value(1.0); });
  for (const char* name : {"", "gelu"})
    add("unknown activation", [=](Subject& s) { s.a.values[s.activation()] = value(name); });
  add("absent activation", [](Subject& s) { s.a.values[s.activation()] = none(); });
  add("a string for alpha", [](Subject& s) { s.a.values[s.activation() + 1] = value("1"); });
  if (op == Op::gated) {
    add("a string for gain", [](Subject& s) { s.a.values[9] = value("1"); });
    return all;
  }
  for (int64_t groups : {-1, 0, 3}) {
    add("groups", [groups](Subject& s) { set_int(s.a.values[6], groups); }, IRT_UNSUPPORTED);
  }
  for (int64_t up : {int64_t{0}, int64_t{-1}, int64_t{2}, int64_t{3}, kMax, kMin}) {
    add("upsample", [up](Subject& s) { set_int(s.a.values[9], up); });
  }
  for (int64_t more : {int64_t{1}, int64_t{-1}, kMax, kMin}) {
    add("output_padding", [more](Subject& s) { set_int(s.a.values[11], more); });
    add("output_padding of a transposed convolution", [more](Subject& s) {
      set_int(s.a.values[10], 1), set_int(s.a.values[11], more);
      s.view(s.weight()).sizes[0] = 3, s.view(s.weight()).sizes[1] = 2;
    });
  }
  add("transposed with a mode", [](Subject& s) { set_int(s.a.values[10], 1), s.a.values[7] = value("reflect"); });
  add("transposed with upsampling", [](Subject& s) { set_int(s.a.values[10], 1), set_int(s.a.values[9], 2); });
  add("unknown order of the residual", [](Subject& s) { s.a.values[17] = value("beside"); });
  add("a second part of a first that fills no block", [](Subject& s) { s.a.values[18] = s.a.values[0]; });
  add("a weight of a second part that is absent", [](Subject& s) { s.a.values[19] = s.a.values[1]; });
  add("a second weight for what fills no block",
      [](Subject& s) { s.a.values[18] = s.a.values[0], s.a.values[19] = s.a.values[1]; });
  add("a second weight that is neither 1×1 nor of the first one's kernel", [](Subject& s) {
    s.a.values[18] = s.a.values[0], s.a.values[19] = s.a.values[1];
    s.second = *s.a.values[1].tensors, s.second.sizes[2] = 2, s.a.values[19].tensors = &s.second;
  });
  return all;
}

// Each part of x with a weight of its own, one of which is wrong in one place.
void weights_apart_that_do_not_fit() {
  Random random{3};
  Setting s = correct(Op::fused);
  s.first = 32, s.inputs = 35, s.apart = true, s.mask_images = 0;
  CHECK(Subject(random, s).answer("weights apart").code == IRT_OK, "weights apart are refused");
  for (size_t i : {size_t{1}, size_t{19}}) {
    for (int d = 0; d < 4; ++d) {
      for (int64_t more : {-1, 1}) {
        Subject subject(random, s);
        subject.view(i).sizes[d] += more;
        CHECK(subject.answer("a weight apart of another size").code == IRT_BAD_ARGUMENT,
              "weight %d with %d more in dimension %d is accepted", static_cast<int>(i), static_cast<int>(more), d);
      }
    }
    Subject other(random, s), flat(random, s);
    other.view(i).dtype = IRT_BF16, flat.view(i).ndim = 3;
    CHECK(other.answer("dtype").code == IRT_BAD_ARGUMENT, "a weight of another dtype is accepted");
    CHECK(flat.answer("rank").code == IRT_BAD_ARGUMENT, "a weight of three dimensions is accepted");
  }
}

// Float32 weights and vectors beside bf16 images: together or not, but no other mixture, and not for partial_conv2d.
void other_parameters() {
  Random random{4};
  float one = 1.0f;
  for (Op op : kAll) {
    for (size_t i : {size_t{1}, size_t{2}}) {
      for (int dtype : {IRT_F32, IRT_F16}) {
        Subject s(random, correct(op, IRT_BF16));
        const size_t place = s.weight() + i - 1;  // the weight, then the bias
        s.view(place).dtype = dtype, s.view(place).data = &one;
        for (int64_t& stride : s.view(place).strides) stride = 0;
        const bool fits = dtype == IRT_F32 && op != Op::partial;
        CHECK(s.answer("parameters").code == (fits ? IRT_OK : IRT_BAD_ARGUMENT), "%s: argument %d of dtype %d",
              kOps[static_cast<int>(op)], static_cast<int>(place), dtype);
      }
    }
  }
  Setting s = correct(Op::fused, IRT_BF16);
  s.first = 32, s.inputs = 35, s.apart = s.wide = true, s.mask_images = 0;
  CHECK(Subject(random, s).answer("wide weights apart").code == IRT_OK, "wide weights apart are refused");
  for (size_t i : {size_t{1}, size_t{19}}) {
    Subject mixed(random, s);
    mixed.view(i).dtype = IRT_BF16;
    CHECK(mixed.answer("mixed").code == IRT_BAD_ARGUMENT, "weights of two dtypes are accepted");
  }
}

void correct_calls_are_accepted() {
  Random random{1};
  for (Op op : kAll) {
    for (int dtype : {IRT_F32, IRT_BF16}) {
      Subject s(random, correct(op, dtype));
      const irt_status status = s.answer("correct");
      CHECK(status.code == IRT_OK && !*status.message, "%s: %d %s", kOps[static_cast<int>(op)], status.code,
            status.message);
    }
  }
}

void one_fault() {
  Random random{2};
  int count = 0;
  for (Op op : kAll) {
    for (const Fault& fault : faults_of(op)) {
      Subject s(random, correct(op));
      fault.apply(s);
      const irt_status status = s.answer(fault.name);
      CHECK(status.code == fault.code, "%s, %s: status %d '%s'", kOps[static_cast<int>(op)], fault.name, status.code,
            status.message);
      CHECK(*status.message, "%s, %s: no message", kOps[static_cast<int>(op)], fault.name);
      ++count;
    }
  }
  check::note("%d calls", count);
}

// Reflection reaches as far as the image does, less one.
void reflection_beyond_the_image() {
  Random random{3};
  for (Op op : {Op::fused, Op::gated}) {
    for (int64_t upsample = 1; upsample <= (op == Op::fused ? 2 : 1); ++upsample) {
      for (int side = 0; side < 4; ++side) {
        Setting s;
        s.op = op, s.h = 2, s.w = 3, s.kh = s.kw = 2, s.upsample = upsample, s.mode = "reflect";
        const int64_t size = (side % 2 ? s.w : s.h) * upsample;
        for (int64_t pad : {size - 1, size}) {
          s.pads[side] = pad;
          Subject subject(random, s);
          std::copy(s.pads, s.pads + 4, subject.pads);
          CHECK(subject.answer("reflection").code == (pad < size ? IRT_OK : IRT_BAD_ARGUMENT), "%s", s.text().c_str());
        }
      }
    }
  }
}

// A dtype that no kernel has; nothing else may be wrong with the call.
void other_dtypes() {
  Random random{4};
  for (Op op : kAll) {
    for (int dtype : {IRT_F16, IRT_F64, IRT_I64}) {
      Subject s(random, correct(op));
      for (irt_view& v : s.a.views) v.dtype = dtype;
      for (irt_view& v : s.a.outs) v.dtype = dtype;
      const irt_status status = s.answer("dtype");
      CHECK(status.code == IRT_UNSUPPORTED && *status.message, "%s: %d '%s'", kOps[static_cast<int>(op)], status.code,
            status.message);
    }
  }
}

// Of a dimension of size 1 the stride is never used, whatever it is.
void strides_that_mean_nothing() {
  Random random{5};
  for (Op op : kAll) {
    for (int dtype : {IRT_F32, IRT_BF16}) {
      for (int64_t k : {1, 3}) {
        for (int64_t size : {1, 4}) {
          for (int64_t stride : {kMax, kMin}) {
            Setting s = correct(op, dtype);
            s.b = s.inputs = s.outputs = 1, s.h = 1, s.w = size, s.kh = k, s.kw = 1, s.pads[1] = s.pads[3] = 0;
            s.pads[0] = s.pads[2] = k / 2, s.mask_images = s.mask_channels = op != Op::gated;
            s.ieee = size == 1;
            Subject subject(random, s);
            std::copy(s.pads, s.pads + 4, subject.pads);
            const auto garble = [stride](irt_view& v) {
              for (int d = 0; d < v.ndim; ++d) v.strides[d] = v.sizes[d] == 1 ? stride : v.strides[d];
            };
            for (irt_view& v : subject.a.views) garble(v);
            garble(subject.a.outs[0]);
            if (op == Op::partial) garble(subject.a.outs[1]);  // the others have one output
            const irt_status status = subject.answer("strides");
            CHECK(status.code == IRT_OK, "%s: %s", s.text().c_str(), status.message);
            check_result(subject.convolution, subject.convolution.truth(false), kDirectUnits, "strides");
          }
        }
      }
    }
  }
}

// ---- no memory

void a_refusal_by_the_system_is_reported() {
  Random random{6};
  for (Op op : kAll) {
    for (int64_t k : {1, 2, 3, 5}) {
      Setting s = correct(op);
      s.kh = s.kw = k, s.pad(k / 2);
      Subject subject(random, s);
      std::copy(s.pads, s.pads + 4, subject.pads);
      refuse_workspaces = true;
      irt_status status = subject.answer("no memory");
      refuse_workspaces = false;
      CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "%s: status %d '%s'", s.text().c_str(), status.code,
            status.message);
      status = subject.answer("memory again");
      CHECK(status.code == IRT_OK && !*status.message, "%s: status %d '%s'", s.text().c_str(), status.code,
            status.message);
    }
  }
}

// Whichever of its workspaces a call is refused: also where some images of a batch are computed apart from others.
void a_refusal_on_the_way_is_reported() {
  Random random{7};
  int most_granted = 0;
  for (Op op : kAll) {
    Setting s = correct(op);
    s.h = s.w = 12, s.inputs = s.outputs = 18, s.b = 3;
    if (s.mask_images) s.mask_images = 3, s.mask_channels = 1;
    Subject subject(random, s);
    if (op == Op::partial) {  // the second image is all valid; the others are holes but for one pixel
      Tensor& mask = *subject.convolution.mask;
      mask.for_each(
          [&](int64_t i, int64_t c, int64_t y, int64_t x) { mask.set(i, c, y, x, i == 1 || (x == 5 && y == 5)); });
    }
    int granted = 0;
    for (;; ++granted) {
      workspaces_granted = granted;
      const irt_status status = subject.answer("no memory on the way");
      workspaces_granted = -1;
      if (status.code == IRT_OK) break;
      CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "%s: status %d '%s'", s.text().c_str(), status.code,
            status.message);
      CHECK(granted < 8, "%s: never enough", s.text().c_str());
    }
    CHECK(granted > 0, "%s needs no memory", s.text().c_str());
    most_granted = std::max(most_granted, granted);
  }
  CHECK(most_granted > 1, "no call has two workspaces");
}

// Tensors expanded from one number may claim sizes whose workspace cannot even be computed.
void sizes_beyond_all_memory() {
  struct Size {
    int64_t b, inputs, outputs, h, w, k, dilation, pad;
  };
  constexpr Size kSizes[] = {
      {1, 1, 1, kOne << 39, 1, 1, 1, 0},           {1, 1, 1, 1, kOne << 40, 1, 1, 0},
      {1, 1, 1, kOne << 25, kOne << 25, 3, 1, 1},  {1, kOne << 50, 1, 1, 1, 1, 1, 0},
      {1, 1, kOne << 50, 1, 1, 1, 1, 0},           {1, kOne << 28, kOne << 28, 1, 1, 1, 1, 0},
      {1, kOne << 28, 1, 1, kOne << 20, 1, 1, 0},  {kOne << 30, 1, 1, 1, 1, 1, 1, 0},
      {1, 1, 1, 1, 1, 1, 1, kOne << 39},           {1, 1, 1, 4, 4, 3, kOne << 28, kOne << 28},
      {1, 40, 2, 4, 4, 5, kOne << 28, kOne << 29}, {1, 8, 1, 4, 4, 3, kOne << 34, kOne << 34},
      {1, 2, 70, 2, 2, 4, kOne << 28, kOne << 29}, {1, 1, 1, 1, 1, 64, kOne << 28, kOne << 34},
      {1, 1, 40, 4, 4, 3, kOne << 26, kOne << 26}, {1, 300, 3, 4, 4, 7, kOne << 24, kOne << 26},
  };
  float number = 1.0f, other = 1.0f;
  const auto integer = [](int64_t i) {
    irt_value made{IRT_INT, 1, {}};
    made.i = i;
    return made;
  };
  for (const Size& z : kSizes) {
    const int64_t pads[] = {z.pad, z.pad, z.pad, z.pad}, grown = 2 * z.pad - z.dilation * (z.k - 1);
    const int64_t h = z.h + grown, w = z.w + grown;
    for (Op op : kAll) {
      for (int dtype : {IRT_F32, IRT_BF16}) {
        const irt_view x{&number, dtype, 4, {z.b, z.inputs, z.h, z.w}, {}};
        const irt_view mask{&number, dtype, 4, {1, 1, z.h, z.w}, {}};
        const irt_view weight{&number, dtype, 4, {op == Op::gated ? 2 * z.outputs : z.outputs, z.inputs, z.k, z.k}, {}};
        const irt_view outs[] = {{&other, dtype, 4, {z.b, z.outputs, h, w}, {}},
                                 {&other, dtype, 4, {z.b, 1, h, w}, {}}};
        const irt_value image = value(x), filters = value(weight), sides = list(pads, 4), one = integer(1),
                        zero = integer(0);
        const irt_value dilation = integer(z.dilation), mode = value("zeros"), act = value("none");
        std::vector<irt_value> args = {image, filters, none(), one, sides, dilation, mode, act, none(), none()};
        if (op == Op::partial) {
          args = {image, value(mask), filters, none(), one, sides, dilation, value("one"), none()};
        } else if (op == Op::fused) {
          args = {image, filters, none(), one,    sides, dilation, one,    mode,           none(), one,
                  zero,  zero,    none(), none(), act,   none(),   none(), value("after"), none()};
        }
        for (int threads : {1, INT_MAX}) {
          for (int ieee : {0, 1}) {
            irt_call call =
                call_of(args.data(), static_cast<int>(args.size()), outs, op == Op::partial ? 2 : 1, threads);
            call.ieee = ieee;
            irt_status status;
            irt_cpu_find(kOps[static_cast<int>(op)])(&call, &status);
            CHECK((status.code == IRT_OUT_OF_MEMORY || status.code == IRT_BAD_ARGUMENT) && *status.message &&
                      other == 1.0f,
                  "%s, %lld to %lld channels of %lldx%lld, kernel %lld, dilation %lld, padding %lld: status %d '%s'",
                  kOps[static_cast<int>(op)], static_cast<long long>(z.inputs), static_cast<long long>(z.outputs),
                  static_cast<long long>(z.h), static_cast<long long>(z.w), static_cast<long long>(z.k),
                  static_cast<long long>(z.dilation), static_cast<long long>(z.pad), status.code, status.message);
          }
        }
      }
    }
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"correct calls are accepted", correct_calls_are_accepted},
    {"one fault", one_fault},
    {"weights apart that do not fit", weights_apart_that_do_not_fit},
    {"other parameters", other_parameters},
    {"reflection beyond the image", reflection_beyond_the_image},
    {"other dtypes", other_dtypes},
    {"strides that mean nothing", strides_that_mean_nothing},
    {"a refusal by the system is reported", a_refusal_by_the_system_is_reported},
    {"a refusal on the way is reported", a_refusal_on_the_way_is_reported},
    {"sizes beyond all memory", sizes_beyond_all_memory},
    {nullptr, nullptr},
};
