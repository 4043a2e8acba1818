// window_attention and window_mask_update against plain loops in double: layouts, formats, sizes, masks of all kinds,
// biases, threads; wrong calls; no memory.
//
// The bound of an element is its rounding band: float's precision on the weighted values, with that of the largest sum
// of logit terms, since an error of a logit is a relative error of its weight; and half a unit of the storage format.
// Keys that are left out may cost another unit of the norm of the values in the window. `kUnits` is what was measured
// in float32, with half as much again.
//
// Workspaces: guarded_workspace.h.
#include <algorithm>
#include <climits>
#include <functional>
#include <memory>

#include "guarded_workspace.h"
#include "tensors.h"

namespace {

constexpr double kUnits = 0.75;
constexpr double kFloatUnit = 0x1p-24;

const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};

double largest = 0.0;  // error in units of the band, of float32 results

enum class Mask { none, ones, zeros, random, fractional, any };

struct Setting {
  int dtype = IRT_F32;
  int64_t b = 1, down = 1, across = 1, size = 4, heads = 1, channels = 4, shift = 0;
  double scale = 0.0, mask_value = -100.0;  // scale 0: None
  Mask mask = Mask::none;
  int64_t masks = 1;
  bool bias = false, wide = false;  // wide: mask and bias are float32 whatever the dtype
  Memory memory[5] = {};            // q, k, v, mask, output
  int threads = 1;

  int64_t tokens() const { return size * size; }
  Shape map() const { return {{b, down * size, across * size, heads * channels}}; }
};

irt_value integer(int64_t i) {
  irt_value made{IRT_INT, 1, {}};
  made.i = i;
  return made;
}

struct Problem {
  const Setting& s;
  std::unique_ptr<Tensor> q, k, v, mask, bias, out;
  irt_view bias_view{};

  Problem(Random& random, const Setting& setting) : s(setting) {
    const auto make = [&](int i) { return std::make_unique<Tensor>(random, s.dtype, s.map(), s.memory[i]); };
    q = make(0), k = make(1), v = make(2), out = make(4);
    for (Tensor* t : {q.get(), k.get(), v.get()}) t->fill(random);
    const int dtype = s.wide ? IRT_F32 : s.dtype;
    if (s.mask != Mask::none) {
      const Shape shape{{s.masks, s.down * s.size, s.across * s.size, 1}};
      mask = std::make_unique<Tensor>(random, dtype, shape, s.memory[3]);
      mask->fill(random);
      mask->for_each([&](int64_t b, int64_t y, int64_t x, int64_t c) {
        const auto eighths = static_cast<double>(random.between(0, 8)) / 8.0;
        if (s.mask == Mask::ones) mask->set(b, y, x, c, 1.0);
        if (s.mask == Mask::zeros) mask->set(b, y, x, c, 0.0);
        if (s.mask == Mask::random) mask->set(b, y, x, c, eighths < 0.5 ? 0.0 : 1.0);
        if (s.mask == Mask::fractional) mask->set(b, y, x, c, eighths);
      });
    }
    if (s.bias) {
      bias = std::make_unique<Tensor>(random, dtype, Shape{{1, s.heads, s.tokens(), s.tokens()}}, Memory::random);
      bias->fill(random);
      bias_view = bias->view();
      bias_view.ndim = 3;
      std::copy_n(bias->view().sizes + 1, 3, bias_view.sizes);
      std::copy_n(bias->view().strides + 1, 3, bias_view.strides);
    }
  }

  irt_status run() const {
    const irt_value args[] = {value(q->view()),
                              value(k->view()),
                              value(v->view()),
                              integer(s.size),
                              integer(s.heads),
                              integer(s.shift),
                              s.scale == 0.0 ? none() : value(s.scale),
                              mask ? value(mask->view()) : none(),
                              bias ? value(bias_view) : none(),
                              value(s.mask_value)};
    const irt_call call = call_of(args, 10, &out->view(), 1, s.threads);
    irt_status status;
    irt_cpu_find("window_attention")(&call, &status);
    return status;
  }

  // Of a token of a window on the rolled map: its place on the map, and its region.
  struct Place {
    int64_t y, x;
    int region;
  };
  Place place(int64_t wy, int64_t wx, int64_t t) const {
    const int64_t h = s.down * s.size, w = s.across * s.size;
    const int64_t y = wy * s.size + t / s.size, x = wx * s.size + t % s.size;
    const auto label = [&](int64_t i, int64_t n) { return i >= n - s.shift ? 2 : i >= n - s.size ? 1 : 0; };
    return {(y + s.shift) % h, (x + s.shift) % w, 3 * label(y, h) + label(x, w)};
  }

  void check(const char* what) const {
    for (int64_t b = 0; b < s.b; ++b) {
      for (int64_t window = 0; window < s.down * s.across; ++window) {
        for (int64_t head = 0; head < s.heads; ++head)
          check_window(b, window / s.across, window % s.across, head, what);
      }
    }
    CHECK(out->canaries_live(), "%s: written beside the output", what);
  }

  void check_window(int64_t b, int64_t wy, int64_t wx, int64_t head, const char* what) const {
    const int64_t n = s.tokens(), c0 = head * s.channels;
    const double scale = s.scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(s.channels)) : s.scale;
    double norm = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      const Place p = place(wy, wx, j);
      for (int64_t c = 0; c < s.channels; ++c) norm += std::pow(v->get(b, p.y, p.x, c0 + c), 2);
    }
    norm = std::sqrt(norm);
    std::vector<double> weights(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const Place query = place(wy, wx, i);
      double top = -INFINITY, sum = 0.0, terms = 0.0;
      for (int64_t j = 0; j < n; ++j) {
        const Place key = place(wy, wx, j);
        double logit = 0.0, size = 0.0;
        const auto add = [&](double x) { logit += x, size += std::fabs(x); };
        for (int64_t c = 0; c < s.channels; ++c) {
          add(scale * q->get(b, query.y, query.x, c0 + c) * k->get(b, key.y, key.x, c0 + c));
        }
        if (bias) add(bias->get(0, head, i, j));
        if (query.region != key.region) add(s.mask_value);
        if (mask) {
          const double m = mask->get(s.masks == 1 ? 0 : b, key.y, key.x, 0);
          add(m == 1.0 ? 0.0 : m == 0.0 ? s.mask_value : m);
        }
        weights[static_cast<size_t>(j)] = logit;
        terms = std::max(terms, size);
        top = logit > top || std::isnan(logit) ? logit : top;
      }
      for (double& w : weights) sum += w = std::exp(w - top);
      for (int64_t c = 0; c < s.channels; ++c) {
        double want = 0.0, size = 0.0;
        for (int64_t j = 0; j < n; ++j) {
          const Place key = place(wy, wx, j);
          const double term = weights[static_cast<size_t>(j)] / sum * v->get(b, key.y, key.x, c0 + c);
          want += term, size += std::fabs(term);
        }
        const double got = out->get(b, query.y, query.x, c0 + c);
        if (!std::isfinite(want)) {
          CHECK(std::isnan(got) == std::isnan(want), "%s: %g where %g should be", what, got, want);
          continue;
        }
        const double band = kFloatUnit * (size * (8.0 + 2.0 * terms) + norm) + 0x1p-140, error = std::fabs(got - want);
        if (s.dtype == IRT_F32) largest = std::max(largest, error / band);
        const double allowed = kUnits * band;
        const double rounding = s.dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + allowed, s.dtype);
        CHECK(error <= allowed + rounding, "%s: %.9g, not %.9g, at window %d %d, query %d, channel %d", what, got, want,
              static_cast<int>(wy), static_cast<int>(wx), static_cast<int>(i), static_cast<int>(c0 + c));
      }
    }
  }
};

void check_call(Random& random, const Setting& s, const char* what) {
  const Problem p(random, s);
  const std::vector<unsigned char> before[] = {p.q->bytes(), p.k->bytes(), p.v->bytes()};
  const irt_status status = p.run();
  CHECK(status.code == IRT_OK && !*status.message, "%s: status %d '%s'", what, status.code, status.message);
  p.check(what);
  CHECK(p.q->bytes() == before[0] && p.k->bytes() == before[1] && p.v->bytes() == before[2], "%s: an input was written",
        what);
}

Setting random_setting(Random& random) {
  Setting s;
  s.dtype = kDtypes[random.between(0, 2)];
  s.b = random.between(1, 2), s.down = random.between(1, 2), s.across = random.between(1, 3);
  s.size = random.between(0, 2) ? random.between(1, 5) : random.between(6, 9);
  s.heads = random.between(1, 3), s.channels = random.between(0, 2) ? random.between(1, 9) : random.between(10, 40);
  s.shift = random.between(0, 1) ? random.between(0, s.size - 1) : 0;
  const double scales[] = {0.0, 0x1p-5, 0x1p-8, 0x1p-12, -0x1p-7};
  s.scale = scales[random.between(0, 4)];
  s.mask = static_cast<Mask>(random.between(0, 5)), s.masks = random.between(0, 1) ? s.b : 1;
  s.bias = random.between(0, 3) == 0, s.wide = random.between(0, 1);
  if (random.between(0, 4) == 0) s.mask_value = random.between(0, 1) ? 0.5 : -7.0;
  for (Memory& m : s.memory) m = random.between(0, 1) ? Memory::nchw : static_cast<Memory>(random.between(0, 3));
  if (s.memory[4] == Memory::expanded) s.memory[4] = Memory::nhwc;
  s.threads = static_cast<int>(random.between(1, 4));
  return s;
}

void any_options_together() {
  Random random{11};
  for (int round = 0; round < 150; ++round) check_call(random, random_setting(random), "random");
  check::note("float32: at most %.2f of %.2f units", largest, kUnits);
}

void windows_of_real_networks() {
  Random random{12};
  for (int dtype : kDtypes) {
    for (Mask mask : {Mask::none, Mask::ones, Mask::zeros, Mask::random, Mask::fractional}) {
      for (int64_t shift : {0, 4}) {
        Setting s;
        s.dtype = dtype, s.mask = mask, s.shift = shift, s.size = 8, s.heads = 2, s.channels = 30, s.scale = 0x1p-9;
        s.down = 2, s.across = 2, s.threads = 3;
        check_call(random, s, "MAT");
      }
    }
  }
  Setting s;
  s.size = 16, s.heads = 1, s.channels = 30, s.scale = 0x1p-9, s.shift = 8, s.mask = Mask::random;
  check_call(random, s, "MAT, wide");
  s = Setting();
  s.size = 7, s.heads = 3, s.channels = 32, s.shift = 3, s.bias = true, s.down = 2;
  check_call(random, s, "Swin");
}

// A NaN or an infinity anywhere in one token, of which the mask says that it is invalid, or nothing.
void what_is_not_finite_shows() {
  Random random{13};
  for (int operand = 0; operand < 4; ++operand) {
    for (const double special :
         {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
      Setting s;
      s.size = 3, s.down = 2, s.channels = 5, s.scale = 0x1p-9, s.shift = operand % 2, s.mask = Mask::random;
      Problem p(random, s);
      Tensor* tensors[] = {p.q.get(), p.k.get(), p.v.get(), p.mask.get()};
      tensors[operand]->set(0, 4, 1, operand == 3 ? 0 : 2, special);
      if (operand < 3) p.mask->set(0, 4, 1, 0, 0.0);
      const irt_status status = p.run();
      CHECK(status.code == IRT_OK, "status %d", status.code);
      if (operand != 2) p.check("not finite");  // an infinite value times e^-100: what is 0 is the format's affair
      if (operand == 2) {
        int odd = 0;
        for (int64_t t = 0; t < 18; ++t) odd += !std::isfinite(p.out->get(0, t / 3, t % 3, 2));
        CHECK(odd == 9, "%d results of 9 are not finite", odd);
      }
    }
  }
}

void no_images() {
  Random random{14};
  for (int dtype : kDtypes) {
    Setting s;
    s.b = 0, s.dtype = dtype, s.threads = 4, s.shift = 1;
    check_call(random, s, "empty");
  }
}

void a_refusal_by_the_system_is_reported() {
  Random random{15};
  Setting s;
  s.dtype = IRT_F16, s.threads = 2;
  const Problem p(random, s);
  const std::vector<unsigned char> before = p.out->bytes();
  refuse_workspaces = true;
  const irt_status status = p.run();
  refuse_workspaces = false;
  CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "status %d '%s'", status.code, status.message);
  CHECK(p.out->bytes() == before, "the output was written without memory");
}

void updates() {
  Random random{16};
  for (int round = 0; round < 60; ++round) {
    Setting s = random_setting(random);
    s.heads = s.channels = 1;
    if (s.mask == Mask::none) s.mask = Mask::any;
    s.masks = s.b, s.wide = false;
    const Problem p(random, s);
    const irt_value args[] = {value(p.mask->view()), integer(s.size), integer(s.shift)};
    const irt_call call = call_of(args, 3, &p.out->view(), 1, s.threads);
    irt_status status;
    irt_cpu_find("window_mask_update")(&call, &status);
    CHECK(status.code == IRT_OK && !*status.message, "status %d '%s'", status.code, status.message);
    for (int64_t b = 0; b < s.b; ++b) {
      for (int64_t window = 0; window < s.down * s.across; ++window) {
        double sum = 0.0;
        for (int64_t t = 0; t < s.tokens(); ++t) {
          const Problem::Place at = p.place(window / s.across, window % s.across, t);
          sum += p.mask->get(b, at.y, at.x, 0);
        }
        const double want = std::clamp(sum, 0.0, 1.0);
        for (int64_t t = 0; t < s.tokens(); ++t) {
          const Problem::Place at = p.place(window / s.across, window % s.across, t);
          const double got = p.out->get(b, at.y, at.x, 0);
          CHECK(std::fabs(got - want) <= half_unit(want, s.dtype), "%g, not %g", got, want);
        }
      }
    }
    CHECK(p.out->canaries_live(), "written beside the output");
  }
}

// ---- wrong calls ----------------------------------------------------------------------------------------------------

struct Subject {
  float memory[256];
  irt_view views[6];  // q, k, v, mask, bias, output
  irt_value args[10];
  irt_call call;

  Subject() {
    for (float& f : memory) f = 0.5f;
    const int64_t sizes[6][4] = {{1, 2, 4, 4}, {1, 2, 4, 4}, {1, 2, 4, 4}, {1, 2, 4, 1}, {2, 4, 4, 0}, {1, 2, 4, 4}};
    for (int i = 0; i < 6; ++i) {
      views[i] = {};
      views[i].data = memory + 40 * i;
      views[i].dtype = IRT_F32;
      views[i].ndim = i == 4 ? 3 : 4;
      int64_t stride = 1;
      for (int d = views[i].ndim - 1; d >= 0; stride *= sizes[i][d], --d) {
        views[i].sizes[d] = sizes[i][d], views[i].strides[d] = stride;
      }
    }
    for (int i = 0; i < 3; ++i) args[i] = value(views[i]);
    args[3] = integer(2), args[4] = integer(2), args[5] = integer(1), args[6] = none();
    args[7] = value(views[3]), args[8] = value(views[4]), args[9] = value(-100.0);
    call = call_of(args, 10, &views[5], 1, 1);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  irt_status answer() {
    irt_status status;
    float before[256];
    memcpy(before, memory, sizeof before);
    irt_cpu_find("window_attention")(&call, &status);
    CHECK(status.code == IRT_OK || !memcmp(before, memory, sizeof before), "memory changed beside an error");
    return status;
  }
};

void one_fault() {
  Subject right;
  CHECK(right.answer().code == IRT_OK, "a correct call is refused");
  int count = 0;
  const auto wrong = [&](const char* what, const std::function<void(Subject&)>& change, int code = IRT_BAD_ARGUMENT) {
    Subject s;
    change(s);
    const irt_status status = s.answer();
    CHECK(status.code == code && *status.message, "%s: %d '%s'", what, status.code, status.message);
    ++count;
  };
  for (int nargs : {-1, 0, 9}) wrong("count of arguments", [nargs](Subject& s) { s.call.nargs = nargs; });
  for (int nouts : {-1, 0}) wrong("count of outputs", [nouts](Subject& s) { s.call.nouts = nouts; });
  for (int at : {3, 4, 5}) {
    wrong("no number", [at](Subject& s) { s.args[at] = none(); });
    wrong("a fraction", [at](Subject& s) { s.args[at] = value(2.0); });
    for (int64_t i : {int64_t{-1}, int64_t{3}, int64_t{5}, INT64_MAX, INT64_MIN}) {
      wrong("a number that does not fit", [at, i](Subject& s) { s.args[at] = integer(i); });
    }
  }
  for (int at : {3, 4}) wrong("zero", [at](Subject& s) { s.args[at] = integer(0); });
  for (int at : {6, 9}) wrong("a word", [at](Subject& s) { s.args[at] = value("-100"); });
  for (const double x : {static_cast<double>(NAN), -static_cast<double>(INFINITY)}) {
    wrong("mask_value is not finite", [x](Subject& s) { s.args[9] = value(x); });
  }
  for (int place = 0; place < 6; ++place) {
    const int at = place < 3 ? place : place + 4;
    if (place < 3) wrong("no tensor", [at](Subject& s) { s.args[at] = none(); });
    if (place < 5) wrong("a list", [at](Subject& s) { s.args[at].kind = IRT_TENSORS; });
    wrong("no data", [place](Subject& s) { s.views[place].data = nullptr; });
    for (int dtype : {-1, INT_MAX, static_cast<int>(IRT_F16), static_cast<int>(IRT_F64)}) {
      wrong("dtype", [place, dtype](Subject& s) { s.views[place].dtype = dtype; });
    }
    for (int ndim : {-1, 0, 2, 7}) wrong("rank", [place, ndim](Subject& s) { s.views[place].ndim = ndim; });
    for (int d = 0; d < right.views[place].ndim; ++d) {
      for (int64_t size : {int64_t{-1}, int64_t{0}, int64_t{7}, INT64_MAX}) {
        wrong("size", [place, d, size](Subject& s) { s.views[place].sizes[d] = size; });
      }
    }
  }
  for (int dtype : {IRT_F64, IRT_I32, IRT_BOOL}) {
    wrong(
        "a dtype there is no kernel for",
        [dtype](Subject& s) {
          for (irt_view& v : s.views) v.dtype = dtype;
        },
        IRT_UNSUPPORTED);
  }
  wrong(
      "a window that no memory holds",
      [](Subject& s) {
        s.args[3] = integer(int64_t{1} << 16), s.args[4] = integer(1), s.args[7] = s.args[8] = none();
        for (int i : {0, 1, 2, 5}) {
          irt_view& v = s.views[i];
          for (int d = 0; d < 4; ++d) v.sizes[d] = d == 1 || d == 2 ? int64_t{1} << 16 : 1, v.strides[d] = 0;
        }
      },
      IRT_OUT_OF_MEMORY);
  check::note("%d calls", count);
}

}  // namespace

const check::Case check::cases[] = {
    {"any options together", any_options_together},
    {"windows of real networks", windows_of_real_networks},
    {"what is not finite shows", what_is_not_finite_shows},
    {"no images", no_images},
    {"a refusal by the system is reported", a_refusal_by_the_system_is_reported},
    {"updates", updates},
    {"one fault", one_fault},
    {nullptr, nullptr},
};
