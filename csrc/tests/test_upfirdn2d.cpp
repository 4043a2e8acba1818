// upfirdn2d against a plain double loop: filters of one rank and of more, factors, crops, formats, layouts, threads;
// and wrong calls.
#include <climits>

#include "tensors.h"

namespace {

constexpr double kUnits = 3.0;  // of float's precision on the terms of a sum

struct Setting {
  int dtype = IRT_F32;
  Shape shape{{1, 1, 1, 1}};
  int64_t rows = 1, columns = 1, up[2] = {1, 1}, down[2] = {1, 1}, pads[4] = {};  // (x, y); left, right, top, bottom
  bool outer = false, flip = false;
  double gain = 1.0;
  Memory memory = Memory::nchw, out_memory = Memory::nchw;
  int threads = 2;

  int64_t size(int d) const {  // 0: rows, 1: columns
    const int64_t taps = d ? columns : rows;
    const int64_t room = shape.sizes[2 + d] * up[1 - d] + pads[2 - 2 * d] + pads[3 - 2 * d] - taps;
    return room < 0 ? 0 : room / down[1 - d] + 1;
  }
};

struct Subject {
  Setting s;
  Tensor x, f, out;
  irt_value args[7];
  irt_view filter;

  Subject(Random& random, const Setting& setting)
      : s(setting),
        x(random, s.dtype, s.shape, s.memory),
        f(random, IRT_F32, {{1, 1, s.rows, s.columns}}, Memory::nchw),
        out(random, s.dtype, {{s.shape.sizes[0], s.shape.sizes[1], s.size(0), s.size(1)}}, s.out_memory) {
    x.fill(random), f.fill(random);
    for (int64_t i = 1; s.outer && i < s.rows; ++i) {
      for (int64_t j = 0; j < s.columns; ++j)
        f.set(0, 0, i, j, std::ldexp(f.get(0, 0, 0, j), static_cast<int>(i % 3) - 1));
    }
    filter = f.view(), filter.ndim = 2;
    for (int d = 0; d < 2; ++d) filter.sizes[d] = filter.sizes[d + 2], filter.strides[d] = filter.strides[d + 2];
    const irt_value given[] = {value(x.view()), value(filter), list(s.up, 2), list(s.down, 2),
                               list(s.pads, 4), none(),        value(s.gain)};
    for (int i = 0; i < 7; ++i) args[i] = given[i];
    args[2].ints = s.up, args[3].ints = s.down, args[4].ints = s.pads;
    args[5].kind = IRT_INT, args[5].i = s.flip;
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  irt_status run() const {
    const irt_call call = call_of(args, 7, &out.view(), 1, s.threads);
    irt_status status;
    irt_cpu_find("upfirdn2d")(&call, &status);
    return status;
  }

  void check(const char* what) const {
    const irt_status status = run();
    CHECK(status.code == IRT_OK, "%s: %s", what, status.message);
    CHECK(out.canaries_live(), "%s: written beside the output", what);
    out.for_each([&](int64_t b, int64_t c, int64_t y, int64_t x_) {
      double sum = 0.0, size = 0.0;
      for (int64_t i = 0; i < s.rows; ++i) {
        for (int64_t j = 0; j < s.columns; ++j) {
          const int64_t row = y * s.down[1] + i - s.pads[2], column = x_ * s.down[0] + j - s.pads[0];
          if (row < 0 || column < 0 || row % s.up[1] || column % s.up[0]) continue;
          if (row / s.up[1] >= s.shape.sizes[2] || column / s.up[0] >= s.shape.sizes[3]) continue;
          const double tap = s.flip ? f.get(0, 0, i, j) : f.get(0, 0, s.rows - 1 - i, s.columns - 1 - j);
          const double term = s.gain * tap * x.get(b, c, row / s.up[1], column / s.up[0]);
          sum += term, size += std::fabs(term);
        }
      }
      const double got = out.get(b, c, y, x_), band = kUnits * 0x1p-24 * size + 0x1p-149;
      const double allowed = band + (s.dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(sum) + band, s.dtype));
      CHECK(std::fabs(got - sum) <= allowed, "%s: %.9g, not %.9g, at %d %d", what, got, sum, static_cast<int>(y),
            static_cast<int>(x_));
    });
  }
};

Setting random_setting(Random& random) {
  constexpr int64_t kChannels[] = {1, 3, 8, 15, 16, 17, 33};
  for (;;) {
    Setting s;
    s.dtype = random.between(0, 2) ? IRT_F32 : IRT_BF16;
    s.shape = {{random.between(1, 2), kChannels[random.between(0, 6)], random.between(1, 9), random.between(1, 9)}};
    s.rows = random.between(1, 6), s.columns = random.between(1, 6);
    if (random.between(0, 1)) s.rows = s.columns = 4;
    for (int d = 0; d < 2; ++d) {
      s.up[d] = random.between(0, 2) ? random.between(1, 2) : random.between(1, 5);
      s.down[d] = random.between(0, 2) ? random.between(1, 2) : random.between(1, 5);
    }
    for (int64_t& pad : s.pads) pad = random.between(-2, 5);
    s.outer = random.between(0, 1) == 0, s.flip = random.between(0, 1) == 0;
    s.gain = random.between(0, 1) ? 1.0 : 4.0;
    s.memory = static_cast<Memory>(random.between(0, 3)), s.out_memory = static_cast<Memory>(random.between(0, 2));
    s.threads = static_cast<int>(random.between(1, 3));
    if (s.size(0) > 0 && s.size(1) > 0) return s;
  }
}

void anything() {
  Random random{11};
  for (int i = 0; i < 600; ++i) Subject(random, random_setting(random)).check("random");
  Setting wide;  // several pieces of a row, and of a row of which only every third pixel is kept
  wide.shape = {{1, 17, 3, 205}}, wide.rows = wide.columns = 4, wide.outer = true;
  wide.pads[0] = wide.pads[1] = 2, wide.pads[2] = 1;
  for (const int64_t down : {1, 3}) {
    for (const int64_t up : {1, 2, 3}) {
      wide.down[0] = down, wide.up[0] = up;
      Subject(random, wide).check("wide");
    }
  }
  wide.outer = false, wide.dtype = IRT_BF16, wide.memory = wide.out_memory = Memory::nhwc;
  Subject(random, wide).check("wide, of a higher rank");
}

void wrong_calls() {
  Random random{12};
  Setting s;
  s.shape = {{2, 3, 6, 7}}, s.rows = 2, s.columns = 3;
  const auto answer = [&](const char* what, const auto& change) {
    Subject subject(random, s);
    irt_view x = subject.x.view(), out = subject.out.view();
    change(subject, x, out);
    subject.args[0] = value(x);
    const irt_call call = call_of(subject.args, 7, &out, 1, 2);
    irt_status status;
    irt_cpu_find("upfirdn2d")(&call, &status);
    CHECK(status.code != IRT_OK && *status.message, "%s: accepted", what);
  };
  answer("a size", [](Subject&, irt_view&, irt_view& out) { --out.sizes[2]; });
  answer("channels", [](Subject&, irt_view&, irt_view& out) { --out.sizes[1]; });
  answer("a dtype", [](Subject&, irt_view& x, irt_view&) { x.dtype = IRT_BF16; });
  answer("half precision", [](Subject&, irt_view& x, irt_view& out) { x.dtype = out.dtype = IRT_F16; });
  answer("a factor", [](Subject& a, irt_view&, irt_view&) { a.s.up[0] = 0; });
  answer("a large factor", [](Subject& a, irt_view&, irt_view&) { a.s.down[1] = 9; });
  answer("padding", [](Subject& a, irt_view&, irt_view&) { a.s.pads[0] = LLONG_MAX; });
  answer("negative padding", [](Subject& a, irt_view&, irt_view&) { a.s.pads[3] = LLONG_MIN; });
  answer("a list", [](Subject& a, irt_view&, irt_view&) { a.args[4].count = 3; });
  answer("a long filter", [](Subject& a, irt_view&, irt_view&) { a.filter.sizes[0] = 17; });
  answer("an empty image", [](Subject&, irt_view& x, irt_view&) { x.sizes[2] = 0; });
  answer("no filter", [](Subject& a, irt_view&, irt_view&) { a.args[1] = none(); });
}

}  // namespace

const check::Case check::cases[] = {{"anything", anything}, {"wrong calls", wrong_calls}, {nullptr, nullptr}};
