// aot_gate against a plain double loop: formats, layouts, sizes from 0 on, threads, gates whose statistics are hard to
// take; wrong calls; no memory.
//
// The bound of an element is its rounding band: float's precision on the terms of the blend, where the mask also
// carries that of its argument, and half a unit of the storage format. `kUnits` is what was measured in float32, with
// half as much again.
//
// mmap is wrapped (-Wl,--wrap=mmap), so that the system can be made to refuse memory.
#include <sys/mman.h>

#include <climits>
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

constexpr double kUnits = 2.0;
constexpr double kFloatUnit = 0x1p-24;

const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};
const char* const kNames[] = {"f32", "f16", "bf16"};

double largest = 0.0;  // error in units of the float band, of float32 results

irt_status run(const Tensor& x, const Tensor& fuse, const Tensor& gate, double eps, const Tensor& out, int threads) {
  const irt_value args[] = {value(x.view()), value(fuse.view()), value(gate.view()), value(eps)};
  const irt_call call = call_of(args, 4, &out.view(), 1, threads);
  irt_status status;
  irt_cpu_find("aot_gate")(&call, &status);
  return status;
}

void check_plane(const Tensor& x, const Tensor& fuse, const Tensor& gate, double eps, const Tensor& out, int64_t b,
                 int64_t c, const char* what) {
  const int64_t height = out.view().sizes[2], width = out.view().sizes[3];
  const auto pixels = static_cast<double>(height * width);
  double mean = 0.0, squares = 0.0;
  for (int64_t i = 0; i < height * width; ++i) mean += gate.get(b, c, i / width, i % width);
  mean /= pixels;  // in the end, so that a constant has itself for a mean
  for (int64_t i = 0; i < height * width; ++i) squares += std::pow(gate.get(b, c, i / width, i % width) - mean, 2);
  const double slope = 10.0 / (std::sqrt(squares / (pixels - 1.0)) + eps);
  for (int64_t i = 0; i < height * width; ++i) {
    const int64_t h = i / width, w = i % width;
    const double from = x.get(b, c, h, w), to = fuse.get(b, c, h, w), got = out.get(b, c, h, w);
    const double argument = (gate.get(b, c, h, w) - mean) * slope - 5.0, mask = 1.0 / (1.0 + std::exp(-argument));
    const double want = from + (to - from) * mask;
    if (std::isnan(want)) {
      CHECK(std::isnan(got), "%s: %.9g where NaN should be", what, got);
      continue;
    }
    const int dtype = out.view().dtype;
    const double steep = (1.0 - mask) * (std::fabs(argument) + 10.0);
    const double band = kFloatUnit * (std::fabs(from) + std::fabs(to - from) * mask * (2.0 + steep)) + 0x1p-149;
    const double error = std::fabs(got - want);
    if (dtype == IRT_F32 && error / band > largest) largest = error / band;
    const double allowed = kUnits * band;
    CHECK(error <= allowed + (dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + allowed, dtype)),
          "%s %s: %.9g, not %.9g, at %d %d %d %d", what, kNames[dtype], got, want, static_cast<int>(b),
          static_cast<int>(c), static_cast<int>(h), static_cast<int>(w));
  }
}

// A call on tensors of the given layouts: x, fuse, gate, output. Inputs must come out as they went in.
void call(Random& random, int dtype, const Shape& shape, const Memory (&memory)[4], int threads, const char* what,
          const std::function<void(Tensor&)>& change = {}) {
  Tensor x(random, dtype, shape, memory[0]), fuse(random, dtype, shape, memory[1]),
      gate(random, dtype, shape, memory[2]);
  const Tensor out(random, dtype, shape, memory[3]);
  for (Tensor* t : {&x, &fuse, &gate}) t->fill(random);
  if (change) change(gate);
  const double eps = random.between(0, 1) ? 1e-9 : 0.25;
  const std::vector<unsigned char> before[] = {x.bytes(), fuse.bytes(), gate.bytes()};
  const irt_status status = run(x, fuse, gate, eps, out, threads);
  CHECK(status.code == IRT_OK && !*status.message, "%s: %s", what, status.message);
  for (int64_t b = 0; b < shape.sizes[0]; ++b) {
    for (int64_t c = 0; c < shape.sizes[1]; ++c) check_plane(x, fuse, gate, eps, out, b, c, what);
  }
  CHECK(out.canaries_live(), "%s: written beside the output", what);
  CHECK(x.bytes() == before[0] && fuse.bytes() == before[1] && gate.bytes() == before[2], "%s: an input was written",
        what);
}

void every_layout_and_format() {
  Random random{3};
  for (int dtype : kDtypes) {
    for (int round = 0; round < 200; ++round) {
      Shape shape;
      for (int64_t& size : shape.sizes) size = random.between(0, 3) ? random.between(1, 5) : random.between(6, 21);
      Memory memory[4];
      for (Memory& m : memory) m = static_cast<Memory>(random.between(0, 3));
      if (memory[3] == Memory::expanded) memory[3] = Memory::nhwc;
      call(random, dtype, shape, memory, 1, "small");
    }
    for (Memory m : {Memory::nchw, Memory::nhwc}) {
      for (int64_t channels : {1, 15, 16, 33}) call(random, dtype, {{2, channels, 7, 19}}, {m, m, m, m}, 1, "dense");
    }
  }
  check::note("float32: at most %.2f of %.1f units", largest, kUnits);
}

void shares_of_threads() {
  Random random{4};
  for (int threads : {2, 3, 7}) {
    for (Memory m : {Memory::nchw, Memory::nhwc, Memory::random}) {
      call(random, IRT_F32, {{2, 11, 61, 53}}, {m, m, m, m}, threads, "threads");
      call(random, IRT_BF16, {{1, 3, 160, 151}}, {m, m, m, m}, threads, "threads");
    }
  }
}

void empty_tensors_without_memory() {
  Random random{5};
  for (int dtype : kDtypes) {
    for (int empty = 0; empty < 4; ++empty) {
      for (Memory m : {Memory::nchw, Memory::nhwc}) {
        Shape shape{{2, 3, 4, 5}};
        shape.sizes[empty] = 0;
        call(random, dtype, shape, {m, m, m, m}, 4, "empty");
      }
    }
  }
}

// A channel each: a mean of 10⁴ deviations (as far as the format has it), a constant, an outlier where sums begin, huge
// numbers, one infinity, one NaN. Then single pixels, of which all is NaN.
void statistics_that_are_hard_to_take() {
  Random random{6};
  for (int dtype : kDtypes) {
    for (Memory m : {Memory::nchw, Memory::nhwc}) {
      call(random, dtype, {{1, 6, 37, 41}}, {m, m, m, m}, 2, "hard", [&](Tensor& gate) {
        const double huge = dtype == IRT_F16 ? 0x1p10 : 0x1p100;
        gate.for_each([&](int64_t b, int64_t c, int64_t h, int64_t w) {
          const double old = gate.get(b, c, h, w), step = std::ldexp(1.0, 14 - precision_of(dtype));
          if (c == 0) gate.set(b, c, h, w, 0x1p13 + step * static_cast<double>(random.between(0, 9)));
          if (c == 1) gate.set(b, c, h, w, 3.140625);
          if (c == 2 && h == 0 && w == 0) gate.set(b, c, h, w, 0x1p15);
          if (c == 3) gate.set(b, c, h, w, huge * old);
          if (c == 4 && h == 36 && w == 40) gate.set(b, c, h, w, INFINITY);
          if (c == 5 && h == 20 && w == 3) gate.set(b, c, h, w, NAN);
        });
      });
      call(random, dtype, {{2, 3, 1, 1}}, {m, m, m, m}, 1, "one pixel");
    }
  }
}

void a_refusal_by_the_system_is_reported() {
  Random random{7};
  const Shape shape{{1, 40, 30, 5}};
  const Tensor in(random, IRT_F16, shape, Memory::nhwc), out(random, IRT_F16, shape, Memory::nhwc);
  const std::vector<unsigned char> before = out.bytes();
  irt_empty_cache();
  refuse_maps = true;
  irt_status status = run(in, in, in, 1e-9, out, 2);
  refuse_maps = false;
  CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "status %d '%s'", status.code, status.message);
  CHECK(out.bytes() == before, "the output was written without memory for the statistics");
  status = run(in, in, in, 1e-9, out, 2);
  CHECK(status.code == IRT_OK && !*status.message, "status %d '%s'", status.code, status.message);
}

// ---- wrong calls ----------------------------------------------------------------------------------------------------

struct Subject {
  float memory[64];
  irt_view views[4];  // x, fuse, gate, output
  irt_value args[4];
  irt_call call;

  Subject() {
    for (float& f : memory) f = 0.5f;
    for (int i = 0; i < 4; ++i) {
      views[i] = {};
      views[i].data = memory + 12 * i;
      views[i].dtype = IRT_F32;
      views[i].ndim = 4;
      const int64_t sizes[] = {1, 2, 3, 2}, strides[] = {12, 6, 2, 1};
      memcpy(views[i].sizes, sizes, sizeof sizes);
      memcpy(views[i].strides, strides, sizeof strides);
      args[i] = i < 3 ? value(views[i]) : value(1e-9);
    }
    call = call_of(args, 4, &views[3], 1, 1);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  irt_status answer() {
    irt_status status;
    float before[64];
    memcpy(before, memory, sizeof before);
    irt_cpu_find("aot_gate")(&call, &status);
    CHECK(status.code == IRT_OK || !memcmp(before, memory, sizeof before), "memory changed beside an error");
    irt_plan plan;
    irt_status planned;
    irt_plan_find("aot_gate")(&call, &plan, &planned);
    CHECK(planned.code == status.code && (status.code == IRT_OK || plan.count == 0), "the plan says %d '%s'",
          planned.code, planned.message);
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
  for (int nargs : {-1, 0, 3}) wrong("count of arguments", [nargs](Subject& s) { s.call.nargs = nargs; });
  for (int nouts : {-1, 0}) wrong("count of outputs", [nouts](Subject& s) { s.call.nouts = nouts; });
  wrong("eps is a word", [](Subject& s) { s.args[3] = value("1e-9"); });
  for (int place = 0; place < 4; ++place) {
    if (place < 3) wrong("no tensor", [place](Subject& s) { s.args[place] = none(); });
    wrong("no data", [place](Subject& s) { s.views[place].data = nullptr; });
    for (int dtype : {-1, INT_MAX, static_cast<int>(IRT_F16), static_cast<int>(IRT_F64)}) {
      wrong("dtype", [place, dtype](Subject& s) { s.views[place].dtype = dtype; });
    }
    for (int ndim : {-1, 0, 3, 7}) wrong("rank", [place, ndim](Subject& s) { s.views[place].ndim = ndim; });
    for (int d = 0; d < 4; ++d) {
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
  check::note("%d calls", count);
}

}  // namespace

const check::Case check::cases[] = {
    {"every layout and format", every_layout_and_format},
    {"shares of threads", shares_of_threads},
    {"empty tensors without memory", empty_tensors_without_memory},
    {"statistics that are hard to take", statistics_that_are_hard_to_take},
    {"a refusal by the system is reported", a_refusal_by_the_system_is_reported},
    {"one fault", one_fault},
    {nullptr, nullptr},
};
