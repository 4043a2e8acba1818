// sampler_step and linear_step against plain double loops where noise is given; where it is drawn, that results depend
// on neither threads nor batch; layouts, threads, memory beside the outputs; wrong calls, of kernels and of launch
// plans.
//
// The bound of an element is kUnits of float's rounding unit on the sum of its terms' magnitudes, and half a unit of
// the storage format.
#include <functional>

#include "tensors.h"

namespace {

constexpr double kUnits = 8.0, kFloatUnit = 0x1p-24;
const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};

irt_value integer(int64_t i) {
  irt_value v{};
  v.kind = IRT_INT;
  v.i = i;
  return v;
}

// A view of one dimension, or of five: several tensors (B, C, H, W) that lie one after the other in `all`.
irt_view row_of(void* data, int dtype, int64_t n) {
  irt_view view{};
  view.data = data;
  view.dtype = dtype;
  view.ndim = 1;
  view.sizes[0] = n;
  view.strides[0] = 1;
  return view;
}
irt_view stacked(const Tensor& all, int64_t n) {
  irt_view view = all.view();
  view.ndim = 5;
  for (int d = 4; d > 0; --d) view.sizes[d] = all.view().sizes[d - 1], view.strides[d] = all.view().strides[d - 1];
  view.sizes[1] /= n;
  view.sizes[0] = n;
  view.strides[0] = view.sizes[1] * view.strides[1];
  return view;
}

// Magnitudes and sum of a result's terms.
struct Terms {
  double sum = 0.0, size = 0.0;
  void add(double term, double of = 0.0) { sum += term, size += std::fabs(term) + of; }
};

void expect(double got, const Terms& want, int dtype, const char* what) {
  const double band = kUnits * kFloatUnit * want.size + 0x1p-126;
  const double allowed = band + (dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want.sum) + band, dtype));
  CHECK(std::fabs(got - want.sum) <= allowed, "%s: %.9g, not %.9g", what, got, want.sum);
}

irt_status run(const char* op, const irt_value* args, int nargs, const irt_view* outs, int nouts, int threads) {
  const irt_call call = call_of(args, nargs, outs, nouts, threads);
  irt_status status;
  irt_cpu_find(op)(&call, &status);
  return status;
}

// ---- linear_step ---------------------------------------------------------------------------------------------------

void sums_of_given_noise() {
  Random random{11};
  for (int dtype : kDtypes) {
    for (int round = 0; round < 60; ++round) {
      const Shape shape{{random.between(1, 3), random.between(1, 3), random.between(1, 9), random.between(1, 90)}};
      const auto memory = [&] { return static_cast<Memory>(random.between(0, 2)); };
      Tensor a(random, dtype, shape, memory()), b(random, dtype, shape, memory()),
          known(random, dtype, shape, memory());
      Tensor mask(random, dtype, {{shape.sizes[0], 1, shape.sizes[2], shape.sizes[3]}}, memory());
      Tensor noise(random, dtype, {{2 * shape.sizes[0], shape.sizes[1], shape.sizes[2], shape.sizes[3]}}, Memory::nchw);
      const Tensor out(random, dtype, shape, memory());
      for (Tensor* t : {&a, &b, &known, &noise}) t->fill(random);
      mask.for_each([&](int64_t i, int64_t c, int64_t y, int64_t x) {
        mask.set(i, c, y, x, static_cast<double>(random.between(0, 2)) / 2.0);
      });
      float factors[] = {0.75f, -1.5f, 0.25f, 0.5f, 2.0f};
      const irt_view terms[] = {a.view(), b.view()}, noises = stacked(noise, 2), table = row_of(factors, IRT_F32, 5);
      const bool blend = round % 2;
      const irt_value args[] = {list(*terms, 2),
                                value(table),
                                value(noises),
                                none(),
                                integer(0),
                                none(),
                                value(3.0),
                                blend ? value(known.view()) : none(),
                                blend ? value(mask.view()) : none()};
      const irt_status status = run("linear_step", args, 9, &out.view(), 1, round % 3 + 1);
      CHECK(status.code == IRT_OK, "%s", status.message);
      CHECK(out.canaries_live(), "written beside the output");
      out.for_each([&](int64_t i, int64_t c, int64_t y, int64_t x) {
        Terms sum;
        sum.add(0.75 * a.get(i, c, y, x));
        sum.add(-1.5 * b.get(i, c, y, x));
        sum.add(0.25 * noise.get(i, c, y, x));
        sum.sum = std::fmin(3.0, std::fmax(-3.0, sum.sum));
        if (blend) {
          const double m = mask.get(i, 0, y, x), before = sum.size;
          Terms mixed;
          mixed.add(m * (0.5 * known.get(i, c, y, x) + 2.0 * noise.get(i + shape.sizes[0], c, y, x)), 4.0 + before);
          mixed.add((1.0 - m) * sum.sum);
          sum = mixed;
        }
        expect(out.get(i, c, y, x), sum, dtype, "sum");
      });
    }
  }
}

// ---- sampler_step --------------------------------------------------------------------------------------------------

float coefficients[] = {1.25f,     0.75f, 0.375f, 0.625f, -4.0f, -3.0f, 1.0f, 0.875f,
                        0.234375f, 0.75f, 0.5f,   1.0f,   0,     0,     0,    0};

// A correct call of (1, 3, H, W) images, with noise drawn, or given.
struct Step {
  Tensor x, model, known, mask, noise, next, clean;
  irt_view row = row_of(coefficients, IRT_F32, 16), seeds, noises;
  int64_t seed[3] = {42, -7, INT64_MIN};
  irt_view outs[2];
  irt_value args[13];

  Step(Random& random, int64_t batch, int64_t height, int64_t width, Memory memory, bool given)
      : x(random, IRT_F32, {{batch, 3, height, width}}, memory),
        model(random, IRT_F32, {{batch, 6, height, width}}, memory),
        known(random, IRT_F32, {{batch, 3, height, width}}, memory),
        mask(random, IRT_F32, {{batch, 1, height, width}}, memory),
        noise(random, IRT_F32, {{3 * batch, 3, height, width}}, Memory::nchw),
        next(random, IRT_F32, {{batch, 3, height, width}}, memory),
        clean(random, IRT_F32, {{batch, 3, height, width}}, memory),
        seeds(row_of(seed, IRT_I64, batch)),
        noises(stacked(noise, 3)) {
    for (Tensor* t : {&x, &model, &known, &noise}) t->fill(random);
    mask.for_each([&](int64_t i, int64_t c, int64_t h, int64_t w) {
      mask.set(i, c, h, w, static_cast<double>(random.between(0, 2)) / 2.0);
    });
    outs[0] = next.view();
    outs[1] = clean.view();
    const irt_value all[] = {value(x.view()),
                             value(model.view()),
                             value(row),
                             value(known.view()),
                             value(mask.view()),
                             given ? value(noises) : none(),
                             given ? none() : value(seeds),
                             integer(5),
                             none(),
                             value("epsilon"),
                             value("learned_range"),
                             value(1.0),
                             none()};
    memcpy(args, all, sizeof args);
  }
  irt_status call(int threads) const { return run("sampler_step", args, 13, outs, 2, threads); }
};

void steps_of_given_noise() {
  Random random{12};
  for (int round = 0; round < 60; ++round) {
    const auto memory = static_cast<Memory>(random.between(0, 2));
    const Step s(random, random.between(1, 3), random.between(1, 9), random.between(1, 90), memory, true);
    const irt_status status = s.call(round % 3 + 1);
    CHECK(status.code == IRT_OK, "%s", status.message);
    CHECK(s.next.canaries_live() && s.clean.canaries_live(), "written beside the outputs");
    const int64_t batch = s.x.view().sizes[0];
    s.next.for_each([&](int64_t i, int64_t c, int64_t h, int64_t w) {
      const double x = s.x.get(i, c, h, w), made = s.model.get(i, c, h, w);
      Terms start;
      start.add(1.25 * x);
      start.add(-0.75 * made);
      const double size = start.size;
      start.sum = std::fmin(1.0, std::fmax(-1.0, start.sum));
      expect(s.clean.get(i, c, h, w), start, IRT_F32, "x0");
      const double share = (s.model.get(i, c + 3, h, w) + 1.0) / 2.0,
                   log_variance = share * -3.0 + (1.0 - share) * -4.0;
      const double deviation = std::exp(0.5 * log_variance);
      const auto z = [&](int64_t which) { return s.noise.get(which * batch + i, c, h, w); };
      const double y = 0.375 * start.sum + 0.625 * x + deviation * z(0);
      const double undone = 0.875 * y + std::sqrt(0.234375) * z(1), m = s.mask.get(i, 0, h, w);
      Terms next;
      next.add(m * (0.75 * s.known.get(i, c, h, w) + 0.5 * z(2)));
      // What rounds before: the terms, and the exponent, whose error the exponential multiplies.
      next.add((1.0 - m) * undone,
               size + std::fabs(x) + std::fabs(z(1)) +
                   std::fabs(deviation * z(0)) * (4.0 + std::fabs(log_variance) + std::fabs(4 * share)));
      expect(s.next.get(i, c, h, w), next, IRT_F32, "next");
    });
  }
}

void drawn_noise_depends_on_nothing_else() {
  for (Memory memory : {Memory::nchw, Memory::nhwc}) {
    std::vector<unsigned char> first;
    for (int threads : {1, 2, 5}) {
      Random random{13};
      const Step s(random, 3, 37, 61, memory, false);
      CHECK(s.call(threads).code == IRT_OK, "%d threads", threads);
      CHECK(s.next.canaries_live() && s.clean.canaries_live(), "written beside the outputs");
      if (first.empty()) first = s.next.bytes();
      CHECK(s.next.bytes() == first, "%d threads draw other noise", threads);
    }
  }
}

// ---- wrong calls ---------------------------------------------------------------------------------------------------

void wrong_calls() {
  Random random{14};
  for (bool plan : {false, true}) {
    const struct {
      const char* name;
      std::function<void(Step&)> spoil;
    } faults[] = {
        {"no image", [](Step& s) { s.args[0] = none(); }},
        {"a model's output of three channels", [](Step& s) { s.args[1] = value(s.x.view()); }},
        {"a short row", [](Step& s) { s.row.sizes[0] = 15; }},
        {"rows of other samples", [](Step& s) { s.row.ndim = 2, s.row.sizes[0] = 3, s.row.sizes[1] = 16; }},
        {"known without mask", [](Step& s) { s.args[4] = none(); }},
        {"a mask of two channels", [](Step& s) { s.args[4] = value(s.model.view()); }},
        {"noise and seeds", [](Step& s) { s.args[5] = value(s.noises); }},
        {"neither noise nor seeds", [](Step& s) { s.args[6] = none(); }},
        {"two noises", [](Step& s) { s.noises.sizes[0] = 2, s.args[5] = value(s.noises), s.args[6] = none(); }},
        {"seeds of other samples", [](Step& s) { s.seeds.sizes[0] = 1; }},
        {"seeds of floats", [](Step& s) { s.seeds.dtype = IRT_F32; }},
        {"a negative call", [](Step& s) { s.args[7] = integer(-1); }},
        {"a call beyond 32 bits", [](Step& s) { s.args[7] = integer(int64_t{1} << 32); }},
        {"a counter of two", [](Step& s) { s.args[8] = value(s.seeds); }},
        {"another prediction", [](Step& s) { s.args[9] = value("noise"); }},
        {"another variance", [](Step& s) { s.args[10] = value("fixed_small"); }},
        {"a clip in words", [](Step& s) { s.args[11] = value("1"); }},
        {"guidance of six channels", [](Step& s) { s.args[12] = value(s.model.view()); }},
        {"outputs of six channels", [](Step& s) { s.outs[1] = s.model.view(); }},
    };
    for (const auto& fault : faults) {
      Step s(random, 2, 3, 5, Memory::nchw, false);
      fault.spoil(s);
      const std::vector<unsigned char> before[] = {s.next.bytes(), s.clean.bytes()};
      irt_status status;
      if (plan) {
        static irt_plan launches;
        const irt_call call = call_of(s.args, 13, s.outs, 2, 1);
        irt_plan_find("sampler_step")(&call, &launches, &status);
        CHECK(launches.count == 0, "%s: a launch", fault.name);
      } else {
        status = s.call(1);
      }
      CHECK(status.code == IRT_BAD_ARGUMENT && *status.message, "%s: status %d", fault.name, status.code);
      CHECK(s.next.bytes() == before[0] && s.clean.bytes() == before[1], "%s: an output was written", fault.name);
    }
  }
}

void wrong_sums() {
  Random random{15};
  const Tensor a(random, IRT_F32, {{1, 2, 3, 4}}, Memory::nchw), out(random, IRT_F32, {{1, 2, 3, 4}}, Memory::nchw);
  const Tensor half(random, IRT_F16, {{1, 2, 3, 4}}, Memory::nchw), wide(random, IRT_F32, {{1, 2, 3, 5}}, Memory::nchw);
  float factors[9] = {1.0f};
  const irt_view table = row_of(factors, IRT_F32, 4), shorter = row_of(factors, IRT_F32, 3);
  const irt_view many[] = {a.view(), a.view(), a.view(), a.view(), a.view(), a.view()};
  const irt_value good[] = {list(*many, 1), value(table), none(), none(), integer(0), none(), none(), none(), none()};
  CHECK(run("linear_step", good, 9, &out.view(), 1, 1).code == IRT_OK, "the call to be spoilt is good");
  const struct {
    int index;
    irt_value bad;
  } cases[] = {{0, list(*many, 0)},       {0, list(*many, 6)}, {0, value(a.view())}, {0, list(half.view(), 1)},
               {0, list(wide.view(), 1)}, {1, value(shorter)}, {1, none()},          {2, value(a.view())},
               {3, value(table)},         {4, none()},         {5, value(table)},    {6, value("1")},
               {7, value(a.view())},      {8, value(a.view())}};
  const std::vector<unsigned char> before = out.bytes();
  for (const auto& c : cases) {
    irt_value args[9];
    memcpy(args, good, sizeof args);
    args[c.index] = c.bad;
    const irt_status status = run("linear_step", args, 9, &out.view(), 1, 1);
    CHECK(status.code == IRT_BAD_ARGUMENT && *status.message, "argument %d: status %d", c.index, status.code);
    CHECK(out.bytes() == before, "argument %d: the output was written", c.index);
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"sums of given noise", sums_of_given_noise},
    {"steps of given noise", steps_of_given_noise},
    {"drawn noise depends on nothing else", drawn_noise_depends_on_nothing_else},
    {"wrong calls", wrong_calls},
    {"wrong sums", wrong_sums},
    {nullptr, nullptr},
};
