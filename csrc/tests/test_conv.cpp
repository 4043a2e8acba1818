// The convolution ops against plain sums in double: fused_conv2d, gated_conv2d and partial_conv2d with every option, in
// every layout and format, whatever algorithm the planner takes for them.
//
// Bounds: convolution.h. Workspaces: guarded_workspace.h.
#include <climits>

#include "convolution.h"
#include "guarded_workspace.h"

namespace {

double largest[3] = {};  // of each kind, in units

void check_call(Random& random, const Setting& s, const char* what, int threads = 0) {
  const Convolution c(random, s);
  const irt_status status = c.run(threads ? threads : static_cast<int>(random.between(1, 3)));
  CHECK(status.code == IRT_OK && !*status.message, "%s, %s: status %d '%s'", what, s.text().c_str(), status.code,
        status.message);
  const int kind = !s.spreads() ? 0 : s.ieee ? 2 : 1;
  const double units = kind == 0 ? kDirectUnits : kind == 1 ? kWinogradUnits : kWinogradIeeeUnits;
  largest[kind] = std::max(largest[kind], check_result(c, c.truth(s.spreads()), units, what));
  if (!c.updated) return;
  for (int64_t b = 0; b < s.b; ++b) {
    const std::vector<double> sums = c.mask_sums(b);
    for (int64_t p = 0; p < s.out_size(0) * s.out_size(1); ++p) {
      const int64_t y = p / s.out_size(1), x = p % s.out_size(1);
      const double want = std::clamp(sums[static_cast<size_t>(p)], 0.0, 1.0), got = c.updated->get(b, 0, y, x);
      CHECK(got == want, "%s: the updated mask is %g at (%lld, %lld, %lld), not %g", s.text().c_str(), got,
            static_cast<long long>(b), static_cast<long long>(y), static_cast<long long>(x), want);
    }
  }
  CHECK(c.updated->canaries_live(), "%s: written beside the updated mask", s.text().c_str());
}

void note_errors() {
  check::note("float32: at most %.2f of %.2f units, of Winograd's %.2f of %.2f, under ieee %.2f of %.2f", largest[0],
              kDirectUnits, largest[1], kWinogradUnits, largest[2], kWinogradIeeeUnits);
}

void any_options_together() {
  Random random{1};
  for (const Op op : {Op::fused, Op::fused, Op::gated, Op::partial}) {
    for (int round = 0; round < 45; ++round) check_call(random, random_setting(random, op), "random");
  }
  note_errors();
}

// Where the planner has a choice: enough channels for Winograd's forms.
void square_kernels_of_stride_one() {
  Random random{12};
  for (int round = 0; round < 40; ++round) {
    Setting s = random_setting(random, static_cast<Op>(round % 3));
    s.transposed = false, s.stride = 1, s.output_padding = 0, s.dilation = 1 + round % 5 / 4;
    s.kh = s.kw = round % 2 ? 3 : 5, s.h = random.between(3, 10), s.w = random.between(3, 14), s.mode = kModes[0];
    s.pad(s.kh / 2 * s.dilation), s.pads[round % 4] += round % 3;
    s.outputs += 16;
    check_call(random, s, "square");
  }
  note_errors();
}

void every_kernel_and_stride() {
  Random random{2};
  for (int64_t kh = 1; kh <= 7; ++kh) {
    for (int64_t kw = 1; kw <= 7; ++kw) {
      const int64_t stride = 1 + (kh + kw) % 3;
      for (const int64_t s_stride : {stride, stride % 3 + 1}) {
        Setting s;
        s.dtype = (kh + kw + s_stride) % 4 ? IRT_F32 : IRT_BF16;
        s.kh = kh, s.kw = kw, s.stride = s_stride, s.h = 7, s.w = 8, s.inputs = 3, s.outputs = 5, s.bias = true;
        s.pads[0] = kh / 2, s.pads[1] = kw / 2, s.pads[2] = (kh - 1) / 2, s.pads[3] = (kw - 1) / 2;
        s.mode = kModes[kh % 3];
        check_call(random, s, "kernel");
      }
    }
  }
  note_errors();
}

// One row or column, an image that the kernel exceeds, kernels of 64, the largest stride, and dilations beyond the
// image.
void extremes() {
  Random random{3};
  for (const int64_t dtype : {IRT_F32, IRT_BF16}) {
    for (const auto op : {Op::fused, Op::gated, Op::partial}) {
      Setting s;
      s.op = op, s.dtype = static_cast<int>(dtype), s.inputs = 3, s.outputs = 4, s.mask_images = op == Op::partial,
      s.mask_channels = 1;
      const auto check = [&](int64_t h, int64_t w, int64_t kh, int64_t kw, int64_t pad, int64_t stride,
                             int64_t dilation) {
        s.h = h, s.w = w, s.kh = kh, s.kw = kw, s.stride = stride, s.dilation = dilation, s.pad(pad);
        check_call(random, s, "extreme");
      };
      check(1, 1, 1, 1, 0, 1, 1), check(1, 1, 3, 3, 1, 1, 1), check(1, 1, 5, 5, 2, 1, 1), check(1, 1, 1, 1, 2, 1, 1);
      check(1, 40, 3, 3, 1, 1, 1), check(40, 1, 3, 3, 1, 1, 1), check(1, 40, 1, 3, 0, 2, 1),
          check(40, 1, 3, 1, 0, 2, 1);
      check(2, 3, 7, 7, 3, 1, 1), check(2, 3, 7, 7, 5, 2, 1), check(2, 2, 3, 3, 9, 1, 9), check(3, 2, 5, 5, 14, 1, 7);
      check(9, 10, 3, 3, 0, 8, 1), check(2, 1, 2, 2, 8, 8, 1), check(2, 2, 64, 1, 32, 1, 1),
          check(3, 70, 1, 64, 0, 5, 1);
      check(1, 2, 64, 64, 32, 1, 1);
    }
  }
}

void doubled_images() {
  Random random{4};
  for (const char* mode : kModes) {
    for (int64_t k = 1; k <= 5; ++k) {
      for (int64_t pad = 0; pad <= 2; ++pad) {
        Setting s;
        s.dtype = (k + pad) % 3 ? IRT_F32 : IRT_BF16;
        s.upsample = 2, s.mode = mode, s.kh = k, s.kw = 1 + (k + pad) % 4, s.pad(pad), s.inputs = 3, s.outputs = 9;
        s.h = random.between(2, 5), s.w = random.between(2, 9), s.mask_images = pad % 2, s.mask_channels = 1, s.b = 2;
        s.stride = pad == 2 ? 2 : 1;
        if (s.possible()) check_call(random, s, "doubled");
      }
    }
  }
}

// Strides beyond the kernel leave outputs that no input reaches; output_padding adds rows that few or none do.
void transposed_convolutions() {
  Random random{5};
  for (int64_t k = 1; k <= 5; ++k) {
    for (int64_t stride = 1; stride <= 4; ++stride) {
      Setting s;
      s.dtype = (k + stride) % 3 ? IRT_F32 : IRT_BF16;
      s.transposed = s.bias = true, s.kh = k, s.kw = 1 + k * stride % 4, s.stride = stride, s.inputs = 5, s.outputs = 9;
      s.dilation = 1 + k % 2, s.h = random.between(1, 4), s.w = random.between(1, 7);
      s.output_padding = random.between(0, 5);
      for (int64_t& pad : s.pads) pad = random.between(0, k / 2);
      s.parameters = static_cast<Memory>(random.between(0, 3));
      s.residual = Residual::after, s.activation = "relu", s.mask_images = k % 2, s.mask_channels = 5;
      if (s.possible()) check_call(random, s, "transposed");
    }
  }
}

// What x holds where no mask is valid must not show, not even if it is NaN: a window of holes is 0. Beside Winograd's
// tiles, nothing else may be touched, either.
void holes_are_zero() {
  Random random{6};
  for (const int dtype : {IRT_F32, IRT_BF16}) {
    for (const int64_t stride : {1, 2}) {
      Setting s;
      s.op = Op::partial, s.dtype = dtype, s.bias = true, s.inputs = 3, s.outputs = 5, s.h = 12, s.w = 13,
      s.kh = s.kw = 3;
      s.stride = stride, s.pad(1), s.mask_images = s.mask_channels = 1, s.window = stride == 1;
      const Convolution clean(random, s);
      clean.mask->for_each([&](int64_t, int64_t, int64_t y, int64_t x) {
        clean.mask->set(0, 0, y, x, y < 7 && x > 3 ? 0.0 : 1.0);
        if (y == 3 && x == 7) {
          for (int64_t c = 0; c < s.inputs; ++c) clean.x[0]->set(0, c, y, x, c ? INFINITY : NAN);
        }
      });
      CHECK(clean.run(2).code == IRT_OK, "holes");
      const std::vector<double> sums = clean.mask_sums(0);
      int64_t holes = 0;
      clean.out->for_each([&](int64_t, int64_t o, int64_t y, int64_t x) {
        const double got = clean.out->get(0, o, y, x);
        const bool hole = sums[static_cast<size_t>(y * s.out_size(1) + x)] == 0.0;
        holes += hole;
        CHECK(!hole || (got == 0.0 && clean.updated->get(0, 0, y, x) == 0.0), "%s: a hole is %g", s.text().c_str(),
              got);
        CHECK(s.spreads() || std::isfinite(got), "%s: %g beside the hole", s.text().c_str(), got);
      });
      CHECK(holes > 0, "no holes");
    }
  }
}

// Windows less than a quarter as full as the fullest have the direct form's error, whatever algorithm computes the
// rest; or that of F(2×2, 3×3), where there are so many that it computes the image. (The largest error of as many sums
// is larger than elsewhere.)
void thin_windows() {
  Random random{13};
  for (int round = 0; round < 48; ++round) {
    Setting s;
    s.op = Op::partial, s.dtype = round % 3 ? IRT_F32 : IRT_BF16, s.b = 2, s.inputs = round % 5 ? 33 : 3;
    s.outputs = round % 7 ? 40 : 5, s.h = 31, s.w = 37, s.bias = round % 2;
    s.kh = s.kw = 3 + 2 * (round / 2 % 3), s.stride = 1 + round / 6 % 2,
    s.dilation = s.stride == 1 ? 1 + round / 12 % 2 : 1;
    s.pad(s.kh / 2 * s.dilation), s.pads[round % 4] += round % 3, s.memory = static_cast<Memory>(round / 4 % 3);
    s.out_memory = static_cast<Memory>(round % 3), s.parameters = static_cast<Memory>(round / 3 % 4);
    s.mask_images = 1 + round / 8 % 2, s.mask_channels = round % 4 < 2 ? 1 : s.inputs;
    const Convolution c(random, s);
    c.mask->for_each([&](int64_t b, int64_t channel, int64_t y, int64_t x) {
      const bool hole = y > 8 && x > 4 + 2 * b && x < 30, point = y % 11 == 2 && x % 9 == 3;
      c.mask->set(b, channel, y, x, hole && !point ? 0.0 : round % 8 > 5 && channel % 3 == 0 ? 0.5 : 1.0);
    });
    const irt_status status = c.run(1 + round % 2);
    CHECK(status.code == IRT_OK, "%s: %s", s.text().c_str(), status.message);
    const std::vector<Estimate> truth = c.truth(false);
    const bool spreads = s.kh == 3 && s.stride == 1;
    const std::vector<Estimate> norms = spreads ? c.truth(true) : truth;
    size_t i = 0;
    int64_t thin = 0;
    std::vector<double> sums[2] = {c.mask_sums(0), c.mask_sums(1)};
    c.out->for_each([&](int64_t b, int64_t o, int64_t y, int64_t x) {
      const Estimate &want = truth[i], &norm = norms[i];
      ++i;
      const double sum = sums[b][static_cast<size_t>(y * s.out_size(1) + x)];
      if (sum <= 0.0 || sum >= 0.25 * *std::max_element(sums[b].begin(), sums[b].end())) return;
      const double units =
          std::max(1.5 * kDirectUnits * want.magnitude, spreads ? kWinogradIeeeUnits * norm.magnitude : 0.0);
      const double got = c.out->get(b, o, y, x), band = 0x1p-24 * units;
      const double rounding = s.dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want.value) + band, s.dtype);
      ++thin;
      CHECK(std::fabs(got - want.value) <= band + rounding, "%s: a thin window is %.9g, not %.9g ± %.3g",
            s.text().c_str(), got, want.value, band);
    });
    CHECK(thin > 0, "%s: no thin windows", s.text().c_str());
    CHECK(c.out->canaries_live(), "%s: written beside the output", s.text().c_str());
  }
}

// eps = 0 makes the ratio of a hole 0/0.
void no_eps() {
  Random random{7};
  Setting s;
  s.op = Op::partial, s.inputs = 2, s.outputs = 3, s.h = s.w = 8, s.kh = s.kw = 2, s.mask_images = s.mask_channels = 1;
  s.bias = true, s.eps = 0.0;
  check_call(random, s, "eps is 0");
}

// NaN outside of a window must not enter it, and inside must: except for Winograd's tiles.
void nan_stays_in_its_windows() {
  Random random{8};
  for (const int dtype : {IRT_F32, IRT_BF16}) {
    for (const int64_t k : {1, 2, 3}) {
      Setting s;
      s.dtype = dtype, s.inputs = 33, s.outputs = 17, s.h = 7, s.w = 20, s.kh = s.kw = k, s.stride = k == 3 ? 2 : 1;
      s.activation = "relu";
      const Convolution c(random, s);
      c.x[0]->set(0, 32, 4, 12, NAN);
      CHECK(c.run(1).code == IRT_OK, "NaN");
      check_result(c, c.truth(false), kDirectUnits, "NaN");
    }
  }
}

// Rows, tiles and filters are shared out differently; the shares must not show in a single bit.
void shares_of_threads() {
  Random random{9};
  struct {
    int64_t inputs, outputs, size, k, stride;
  } const kCases[] = {{9, 17, 20, 3, 1}, {9, 17, 21, 3, 2},  {33, 100, 3, 3, 2},
                      {5, 3, 20, 7, 1},  {20, 33, 14, 1, 1}, {4, 9, 13, 5, 1}};
  for (const auto& k : kCases) {
    for (const Op op : {Op::fused, Op::gated, Op::partial}) {
      for (const int dtype : {IRT_F32, IRT_BF16}) {
        Setting s;
        s.op = op, s.dtype = dtype, s.inputs = k.inputs, s.outputs = k.outputs, s.h = k.size, s.w = k.size + 2, s.b = 2;
        s.kh = s.kw = k.k, s.stride = k.stride, s.pad(k.k / 2), s.mask_images = op == Op::partial, s.mask_channels = 1;
        const Convolution c(random, s);
        CHECK(c.run(1).code == IRT_OK, "one thread");
        const std::vector<unsigned char> alone = c.out->bytes();
        for (int threads : {2, 3, INT_MAX, INT_MIN}) {
          CHECK(c.run(threads).code == IRT_OK, "%d threads", threads);
          CHECK(c.out->bytes() == alone, "%s: %d threads give other bits than one", s.text().c_str(), threads);
        }
      }
    }
  }
}

// A batch's images have nothing to do with each other.
void images_are_independent() {
  Random random{10};
  for (int round = 0; round < 20; ++round) {
    Setting s = random_setting(random, static_cast<Op>(round % 3));
    s.b = 2, s.memory = Memory::nchw;
    if (s.mask_images) s.mask_images = 1;
    Convolution c(random, s);
    CHECK(c.run(1).code == IRT_OK, "two images");
    const Convolution::Arguments before(c);
    const auto first = [&](int64_t o, int64_t y, int64_t x) { return c.out->get(0, o, y, x); };
    std::vector<double> kept;
    c.out->for_each([&](int64_t b, int64_t o, int64_t y, int64_t x) { b ? void() : kept.push_back(first(o, y, x)); });
    c.x[0]->for_each([&](int64_t b, int64_t ch, int64_t y, int64_t x) { b ? c.x[0]->set(b, ch, y, x, NAN) : void(); });
    CHECK(c.run(1).code == IRT_OK, "two images");
    size_t i = 0;
    c.out->for_each([&](int64_t b, int64_t o, int64_t y, int64_t x) {
      if (!b) CHECK(first(o, y, x) == kept[i++], "%s: the second image shows in the first", s.text().c_str());
    });
  }
}

void empty_batch() {
  Random random{11};
  for (const Op op : {Op::fused, Op::gated, Op::partial}) {
    for (const int dtype : {IRT_F32, IRT_BF16}) {
      Setting s;
      s.op = op, s.dtype = dtype, s.b = 0, s.inputs = 3, s.outputs = 2, s.h = s.w = 4, s.kh = s.kw = 3, s.pad(1);
      s.mask_images = op == Op::partial, s.mask_channels = 1;
      const Convolution c(random, s);
      const irt_status status = c.run(2);
      CHECK(status.code == IRT_OK && !*status.message, "%s: %s", s.text().c_str(), status.message);
    }
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"any options together", any_options_together},
    {"square kernels of stride 1", square_kernels_of_stride_one},
    {"every kernel and stride", every_kernel_and_stride},
    {"extremes", extremes},
    {"doubled images", doubled_images},
    {"transposed convolutions", transposed_convolutions},
    {"holes are zero", holes_are_zero},
    {"thin windows", thin_windows},
    {"no eps", no_eps},
    {"NaN stays in its windows", nan_stays_in_its_windows},
    {"shares of threads", shares_of_threads},
    {"images are independent", images_are_independent},
    {"empty batch", empty_batch},
    {nullptr, nullptr},
};
