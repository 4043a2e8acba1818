// group_norm_silu against a plain double loop: formats, layouts, one part and two, sizes from 0 on, threads, statistics
// that are hard to take; wrong calls; no memory.
//
// The bound of an element is its rounding band: float's precision on the terms before the activation, whose slope is at
// most 1.1, on the activation, and a 16th of that on the mean in deviations; and half a unit of the storage format.
// `kUnits` leaves room for the exponential.
//
// mmap is wrapped (-Wl,--wrap=mmap), so that the system can be made to refuse memory.
#include <sys/mman.h>

#include <functional>

#include "tensors.h"

namespace {
bool refuse_maps = false;
}

extern "C" void* __real_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset);
extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
  return refuse_maps ? MAP_FAILED : __real_mmap(at, bytes, protection, flags, file, offset);
}

namespace {

constexpr double kUnits = 6.0;
constexpr double kFloatUnit = 0x1p-24;

const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};
double largest = 0.0;  // error in units of the float band, of float32 results

irt_value integer(int64_t i) {
  irt_value v{};
  v.kind = IRT_INT;
  v.i = i;
  return v;
}

// A vector of floats as a view (C,) or (B, C).
struct Vector {
  std::vector<float> data;
  irt_view view{};

  Vector(Random& random, int64_t batch, int64_t channels) : data(static_cast<size_t>((batch ? batch : 1) * channels)) {
    for (float& f : data) f = static_cast<float>(random.between(-40, 40)) / 16.0f;
    view.data = data.data();
    view.dtype = IRT_F32;
    view.ndim = batch ? 2 : 1;
    view.sizes[0] = batch ? batch : channels;
    view.sizes[1] = channels;
    view.strides[0] = batch ? channels : 1;
    view.strides[1] = 1;
  }
  double at(int64_t b, int64_t c) const {
    return static_cast<double>(data[static_cast<size_t>((view.ndim == 2 ? b * view.sizes[1] : 0) + c)]);
  }
};

irt_status run(const irt_value* args, const Tensor& out, int threads) {
  const irt_call call = call_of(args, 9, &out.view(), 1, threads);
  irt_status status;
  irt_cpu_find("group_norm_silu")(&call, &status);
  return status;
}

// A call on x of the given shape, of which the channels from `split` on are the second part, in the layouts of x, the
// second and the output.
void call(Random& random, int dtype, const Shape& shape, int64_t split, int64_t groups, const Memory (&memory)[3],
          int threads, const char* what, const std::function<void(Tensor&)>& change = {}) {
  const int64_t batch = shape.sizes[0], channels = shape.sizes[1], height = shape.sizes[2], width = shape.sizes[3];
  const bool two = split < channels;
  Tensor x(random, dtype, {{batch, split, height, width}}, memory[0]);
  Tensor second(random, dtype, {{batch, channels - split, height, width}}, memory[1]);
  const Tensor out(random, dtype, shape, memory[2]);
  x.fill(random);
  second.fill(random);
  if (change) change(x);
  const Vector weight(random, 0, channels), bias(random, 0, channels), scale(random, batch, channels),
      shift(random, batch, channels);
  const bool film = random.between(0, 1) && batch, affine = random.between(0, 1), silu = random.between(0, 1);
  const irt_value args[] = {value(x.view()),
                            integer(groups),
                            affine ? value(weight.view) : none(),
                            affine ? value(bias.view) : none(),
                            film ? value(scale.view) : none(),
                            film ? value(shift.view) : none(),
                            value(1e-5),
                            value(silu ? "silu" : "none"),
                            two ? value(second.view()) : none()};
  const std::vector<unsigned char> before[] = {x.bytes(), second.bytes()};
  const irt_status status = run(args, out, threads);
  CHECK(status.code == IRT_OK && !*status.message, "%s: %s", what, status.message);
  CHECK(out.canaries_live(), "%s: written beside the output", what);
  CHECK(x.bytes() == before[0] && second.bytes() == before[1], "%s: an input was written", what);

  const int64_t side = channels / groups, pixels = height * width;
  const auto get = [&](int64_t b, int64_t c, int64_t i) {
    return c < split ? x.get(b, c, i / width, i % width) : second.get(b, c - split, i / width, i % width);
  };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels && pixels; ++c) {
      const int64_t first = c / side * side;
      const auto n = static_cast<double>(side * pixels);
      double mean = 0.0, squares = 0.0;
      for (int64_t k = first; k < first + side; ++k) {
        for (int64_t i = 0; i < pixels; ++i) mean += get(b, k, i);
      }
      mean /= n;  // in the end, so that a constant has itself for a mean
      for (int64_t k = first; k < first + side; ++k) {
        for (int64_t i = 0; i < pixels; ++i) squares += std::pow(get(b, k, i) - mean, 2) / n;
      }
      const double film_scale = film ? 1.0 + scale.at(b, c) : 1.0;
      const double slope = (affine ? weight.at(b, c) : 1.0) * film_scale / std::sqrt(squares + 1e-5);
      const double unit = std::fabs((affine ? weight.at(b, c) : 1.0) * film_scale);  // what a deviation becomes
      const double addend = (affine ? bias.at(b, c) : 0.0) * film_scale + (film ? shift.at(b, c) : 0.0);
      for (int64_t i = 0; i < pixels; ++i) {
        const double before_act = (get(b, c, i) - mean) * slope + addend;
        const double want = silu ? before_act / (1.0 + std::exp(-before_act)) : before_act;
        const double got = out.get(b, c, i / width, i % width);
        if (std::isnan(want)) {
          CHECK(std::isnan(got), "%s: %.9g where NaN should be", what, got);
          continue;
        }
        const double band = kFloatUnit * (std::fabs((get(b, c, i) - mean) * slope) + std::fabs(addend) +
                                          std::fabs(want) + unit / 16.0) +
                            0x1p-126;
        const double error = std::fabs(got - want), allowed = kUnits * band;
        if (dtype == IRT_F32 && error / band > largest) largest = error / band;
        CHECK(error <= allowed + (dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + allowed, dtype)),
              "%s: %.9g, not %.9g, at %d %d %d", what, got, want, static_cast<int>(b), static_cast<int>(c),
              static_cast<int>(i));
      }
    }
  }
}

void every_layout_and_format() {
  Random random{3};
  for (int dtype : kDtypes) {
    for (int round = 0; round < 200; ++round) {
      const int64_t groups = random.between(1, 4), side = random.between(1, 9);
      const Shape shape{{random.between(1, 3), groups * side, random.between(1, 9), random.between(1, 21)}};
      Memory memory[3];
      for (Memory& m : memory) m = static_cast<Memory>(random.between(0, 3));
      if (memory[2] == Memory::expanded) memory[2] = Memory::nhwc;
      const int64_t split = random.between(0, 1) ? groups * side : random.between(1, groups * side);
      call(random, dtype, shape, split, groups, memory, 1, "small");
    }
    for (Memory m : {Memory::nchw, Memory::nhwc}) {
      for (int64_t channels : {1, 15, 16, 33}) {
        call(random, dtype, {{2, 3 * channels, 7, 39}}, 2 * channels + 1, 3, {m, m, m}, 1, "dense");
      }
    }
  }
  check::note("float32: at most %.2f of %.1f units", largest, kUnits);
}

void shares_of_threads() {
  Random random{4};
  for (int threads : {2, 3, 7}) {
    for (Memory m : {Memory::nchw, Memory::nhwc, Memory::random}) {
      call(random, IRT_F32, {{2, 12, 61, 53}}, 12, 1, {m, m, m}, threads, "few groups");
      call(random, IRT_BF16, {{1, 16, 60, 51}}, 9, 8, {m, m, m}, threads, "many groups");
      call(random, IRT_F32, {{1, 3, 300, 290}}, 3, 1, {m, m, m}, threads, "pieces of a channel");
    }
  }
}

void past_the_cache() {
  Random random{8};
  call(random, IRT_F32, {{1, 33, 359, 361}}, 16, 3, {Memory::nhwc, Memory::nhwc, Memory::nhwc}, 2, "large");
}

void empty_tensors_without_memory() {
  Random random{5};
  for (int dtype : kDtypes) {
    for (int empty : {0, 2, 3}) {
      for (Memory m : {Memory::nchw, Memory::nhwc}) {
        Shape shape{{2, 3, 4, 5}};
        shape.sizes[empty] = 0;
        call(random, dtype, shape, 3, 3, {m, m, m}, 4, "empty");
      }
    }
  }
}

// A group each: a mean of many deviations, a constant, an outlier where sums begin, huge numbers, one infinity, one
// NaN.
void statistics_that_are_hard_to_take() {
  Random random{6};
  for (int dtype : kDtypes) {
    for (Memory m : {Memory::nchw, Memory::nhwc}) {
      call(random, dtype, {{1, 12, 37, 41}}, 12, 6, {m, m, m}, 2, "hard", [&](Tensor& x) {
        const double huge = dtype == IRT_F16 ? 0x1p10 : 0x1p100;
        x.for_each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
          const double old = x.get(b, c, h, w), step = std::ldexp(1.0, 14 - precision_of(dtype));
          const int64_t group = c / 2;
          if (group == 0) x.set(b, c, h, w, 0x1p13 + step * static_cast<double>(random.between(0, 9)));
          if (group == 1) x.set(b, c, h, w, 3.140625);
          if (c == 4 && h == 0 && w == 0) x.set(b, c, h, w, 0x1p15);
          if (group == 3) x.set(b, c, h, w, huge * old);
          if (c == 8 && h == 36 && w == 40) x.set(b, c, h, w, INFINITY);
          if (c == 11 && h == 20 && w == 3) x.set(b, c, h, w, NAN);
        });
      });
    }
  }
}

void a_refusal_by_the_system_is_reported() {
  Random random{7};
  for (Memory m : {Memory::nchw, Memory::nhwc}) {
    const Shape shape{{1, 40, 30, 5}};
    const Tensor in(random, IRT_F16, shape, m), out(random, IRT_F16, shape, m);
    const std::vector<unsigned char> before = out.bytes();
    const irt_value args[] = {value(in.view()), integer(4),  none(),        none(), none(),
                              none(),           value(1e-5), value("silu"), none()};
    irt_empty_cache();
    refuse_maps = true;
    irt_status status = run(args, out, 2);
    refuse_maps = false;
    CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "status %d '%s'", status.code, status.message);
    CHECK(out.bytes() == before, "the output was written without memory for the statistics");
    status = run(args, out, 2);
    CHECK(status.code == IRT_OK && !*status.message, "status %d '%s'", status.code, status.message);
  }
}

void wrong_calls() {
  Random random{9};
  const Tensor x(random, IRT_F32, {{2, 4, 3, 2}}, Memory::nchw), out(random, IRT_F32, {{2, 4, 3, 2}}, Memory::nchw);
  const Tensor half(random, IRT_F16, {{2, 4, 3, 2}}, Memory::nchw), wide(random, IRT_F32, {{2, 4, 3, 5}}, Memory::nchw);
  const Vector vector(random, 0, 4), longer(random, 0, 5), film(random, 2, 4), other(random, 3, 4);
  const irt_value good[] = {value(x.view()),    integer(2),       value(vector.view),
                            value(vector.view), value(film.view), value(film.view),
                            value(1e-5),        value("none"),    none()};
  CHECK(run(good, out, 1).code == IRT_OK, "the call to be spoilt is good");
  const struct {
    int index;
    irt_value bad;
  } cases[] = {{0, none()},           {0, value(half.view())}, {0, value(wide.view())}, {1, integer(3)},
               {1, integer(0)},       {1, integer(-2)},        {1, value(2.0)},         {2, value(longer.view)},
               {2, value(film.view)}, {3, integer(1)},         {4, value(vector.view)}, {5, value(other.view)},
               {6, value("1e-5")},    {7, value("relu")},      {7, value("nothing")},   {7, none()},
               {8, value(x.view())},  {8, value(half.view())}, {8, integer(1)}};
  for (const auto& c : cases) {
    irt_value args[9];
    memcpy(args, good, sizeof args);
    args[c.index] = c.bad;
    const std::vector<unsigned char> before = out.bytes();
    const irt_status status = run(args, out, 1);
    CHECK(status.code == IRT_BAD_ARGUMENT && *status.message, "argument %d: status %d", c.index, status.code);
    CHECK(out.bytes() == before, "argument %d: the output was written", c.index);
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"every layout and format", every_layout_and_format},
    {"shares of threads", shares_of_threads},
    {"past the cache", past_the_cache},
    {"empty tensors without memory", empty_tensors_without_memory},
    {"statistics that are hard to take", statistics_that_are_hard_to_take},
    {"a refusal by the system is reported", a_refusal_by_the_system_is_reported},
    {"wrong calls", wrong_calls},
    {nullptr, nullptr},
};
