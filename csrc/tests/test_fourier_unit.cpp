// fourier_unit against plain sums in double, in every layout, format and kind of length; wrong calls; no memory.
//
// The bound of an element follows the op: the error of a bin is in proportion to what enters its sum, Σ|W|(|X| + rms X)
// + |b| (a transform spreads its roundings over all bins), the inverse averages them, each level of butterflies adds
// some (log2 of 4hw), and the result is rounded to its format. `kUnits` is what was measured in float32, with half as
// much again.
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

constexpr double kUnits = 0.8;

const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};
const char* const kNames[] = {"f32", "f16", "bf16"};

struct Dims {
  int64_t b, c, co, h, w;
};

// ---- the truth
// -------------------------------------------------------------------------------------------------------

struct Number {
  double re = 0.0, im = 0.0;
  double square() const { return re * re + im * im; }
};

// e^(2πi·k/n) for k in [0, n), and orthonormal sums with them over `n` numbers that lie `step` apart.
struct Circle {
  std::vector<Number> roots;

  explicit Circle(int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      const double angle = 6.283185307179586476925 * static_cast<double>(k) / static_cast<double>(n);
      roots.push_back({std::cos(angle), std::sin(angle)});
    }
  }
  // Σ_j x[j]·e^(±2πi·jk/n)/√n
  Number sum(const Number* x, int64_t step, int64_t k, bool inverse) const {
    const auto n = static_cast<int64_t>(roots.size());
    Number total;
    for (int64_t j = 0, at = 0; j < n; ++j, at = (at + k) % n) {
      const Number z = x[j * step], root = roots[static_cast<size_t>(at)];
      const double s = inverse ? root.im : -root.im;
      total.re += z.re * root.re - z.im * s;
      total.im += z.re * s + z.im * root.re;
    }
    const double scale = 1.0 / std::sqrt(static_cast<double>(n));
    return {total.re * scale, total.im * scale};
  }
};

struct Truth {
  std::vector<double> want;       // (B, Co, h, w), without the residual
  std::vector<double> magnitude;  // (B, Co)
};

struct Inputs {
  const Tensor &x, &weight, *bias, *residual;
};

Truth truth_of(const Dims& d, const Inputs& in) {
  const int64_t half = d.w / 2 + 1, bins = d.h * half;
  const Circle rows(d.w), columns(d.h);
  Truth truth;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  for (int64_t b = 0; b < d.b; ++b) {
    std::vector<Number> spectrum(size(d.c * bins)), line(size(d.w)), plane(size(bins));
    std::vector<double> rms(size(d.c));
    for (int64_t c = 0; c < d.c; ++c) {
      for (int64_t y = 0; y < d.h; ++y) {
        for (int64_t x = 0; x < d.w; ++x) line[size(x)] = {in.x.get(b, c, y, x), 0.0};
        for (int64_t k = 0; k < half; ++k) plane[size(y * half + k)] = rows.sum(line.data(), 1, k, false);
      }
      for (int64_t y = 0; y < d.h; ++y) {
        for (int64_t k = 0; k < half; ++k) {
          const Number z = columns.sum(&plane[size(k)], half, y, false);
          spectrum[size(c * bins + y * half + k)] = z;
          rms[size(c)] += z.square() / static_cast<double>(bins);
        }
      }
      rms[size(c)] = std::sqrt(rms[size(c)]);
    }
    for (int64_t o = 0; o < d.co; ++o) {
      double power = 0.0;
      std::vector<Number> row[2];  // of the weight: what a channel's real and imaginary part count for
      for (int64_t part = 0; part < 2; ++part) {
        for (int64_t c = 0; c < d.c; ++c) {
          row[part].push_back({in.weight.get(2 * o + part, 2 * c, 0, 0), in.weight.get(2 * o + part, 2 * c + 1, 0, 0)});
        }
      }
      for (int64_t bin = 0; bin < bins; ++bin) {
        double parts[2];
        for (int64_t part = 0; part < 2; ++part) {
          const double shift = in.bias ? in.bias->get(2 * o + part, 0, 0, 0) : 0.0;
          double sum = shift, magnitude = std::fabs(shift);
          for (int64_t c = 0; c < d.c; ++c) {
            const Number z = spectrum[size(c * bins + bin)], by = row[part][size(c)];
            sum += by.re * z.re + by.im * z.im;
            magnitude += std::fabs(by.re) * (std::fabs(z.re) + rms[size(c)]);
            magnitude += std::fabs(by.im) * (std::fabs(z.im) + rms[size(c)]);
          }
          parts[part] = sum < 0.0 ? 0.0 : sum;   // keeps NaN
          power += 2.0 * magnitude * magnitude;  // a bin stands for its conjugate, too
        }
        plane[size(bin)] = {parts[0], parts[1]};
      }
      truth.magnitude.push_back(std::sqrt(power / static_cast<double>(d.h * d.w)));
      for (int64_t y = 0; y < d.h; ++y) {
        for (int64_t k = 0; k < half; ++k) {
          const Number z = columns.sum(&plane[size(k)], half, y, true);
          const bool own_conjugate = k == 0 || 2 * k == d.w;
          line[size(k)] = {z.re, own_conjugate ? 0.0 : z.im};  // numpy's rule
          if (!own_conjugate) line[size(d.w - k)] = {z.re, -z.im};
        }
        for (int64_t x = 0; x < d.w; ++x) truth.want.push_back(rows.sum(line.data(), 1, x, true).re);
      }
    }
  }
  return truth;
}

double largest = 0.0;  // error in units of its bound, of float32 results

void check_against(const Truth& truth, const Dims& d, const Inputs& in, const Tensor& out, const char* what) {
  const int dtype = out.view().dtype;
  const double unit = 0x1p-24 * std::log2(static_cast<double>(4 * d.h * d.w));
  size_t at = 0;
  out.for_each([&](int64_t b, int64_t c, int64_t y, int64_t x) {
    const double more = in.residual ? in.residual->get(b, c, y, x) : 0.0;
    const double want = truth.want[at++] + more, got = out.get(b, c, y, x);
    const double units = unit * truth.magnitude[static_cast<size_t>(b * d.co + c)];
    const double rounding = dtype == IRT_F32 ? 0x1p-24 * (std::fabs(want) + std::fabs(more)) : 0.0;
    const double band = kUnits * units + rounding;
    const double error = std::fabs(got - want);
    CHECK(error <= band + (dtype == IRT_F32 ? 0.0 : half_unit(std::fabs(want) + band, dtype)),
          "%s %s, %lldx%lldx%lldx%lld to %lld channels: (%lld, %lld, %lld, %lld) is %.9g, not %.9g", what,
          kNames[dtype], static_cast<long long>(d.b), static_cast<long long>(d.c), static_cast<long long>(d.h),
          static_cast<long long>(d.w), static_cast<long long>(d.co), static_cast<long long>(b),
          static_cast<long long>(c), static_cast<long long>(y), static_cast<long long>(x), got, want);
    if (dtype == IRT_F32 && error - rounding > largest * units) largest = (error - rounding) / units;
  });
  CHECK(out.canaries_live(), "%s: written beside the output", what);
}

// ---- calls
// -----------------------------------------------------------------------------------------------------------

irt_view with_rank(const Tensor& tensor, int ndim) {  // without the last dimensions, which have size 1
  irt_view view = tensor.view();
  view.ndim = ndim;
  return view;
}

irt_status call_kernel(const Inputs& in, const Tensor& out, int threads, int weight_rank = 4) {
  const irt_view weight = with_rank(in.weight, weight_rank), bias = with_rank(in.bias ? *in.bias : in.x, 1);
  const irt_value args[] = {value(in.x.view()), value(weight), in.bias ? value(bias) : none(),
                            in.residual ? value(in.residual->view()) : none()};
  const irt_call call = call_of(args, 4, &out.view(), 1, threads);
  irt_status status;
  memset(&status, 0x7e, sizeof status);
  irt_cpu_find("fourier_unit")(&call, &status);
  return status;
}

// The tensors of one call, filled.
struct Call {
  Dims d;
  int dtype;
  Tensor x, weight, bias, residual;

  // `wide`: weight and bias are float32, whatever x is.
  Call(Random& random, const Dims& dims, int type, Memory memory, Memory parameters, bool wide = false)
      : d(dims),
        dtype(type),
        x(random, type, {{d.b, d.c, d.h, d.w}}, memory),
        weight(random, wide ? int{IRT_F32} : type, {{2 * d.co, 2 * d.c, 1, 1}}, parameters),
        bias(random, wide ? int{IRT_F32} : type, {{2 * d.co, 1, 1, 1}}, parameters),
        residual(random, type, {{d.b, d.co, d.h, d.w}}, memory) {
    for (Tensor* t : {&x, &weight, &bias, &residual}) t->fill(random, wide && t->view().dtype == IRT_F32 ? 12 : 0);
  }
  Shape out_shape() const { return {{d.b, d.co, d.h, d.w}}; }
  Inputs inputs(bool with_bias = true, bool with_residual = true) const {
    return {x, weight, with_bias ? &bias : nullptr, with_residual ? &residual : nullptr};
  }
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const Tensor* t : {&x, &weight, &bias, &residual}) {
      const std::vector<unsigned char> some = t->bytes();
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
};

void round_trip(Random& random, const Dims& d, int dtype, Memory in, Memory parameters, Memory out_in, const char* what,
                bool wide = false) {
  const Call call(random, d, dtype, in, parameters, wide);
  const Inputs inputs = call.inputs(random.between(0, 3) != 0, random.between(0, 2) != 0);
  const Tensor out(random, dtype, call.out_shape(), out_in);
  const std::vector<unsigned char> before = call.bytes();
  const irt_status status = call_kernel(inputs, out, 1, static_cast<int>(random.between(2, 4)));
  CHECK(status.code == IRT_OK && !*status.message, "%s: %s", what, status.message);
  check_against(truth_of(d, inputs), d, inputs, out, what);
  CHECK(call.bytes() == before, "%s: an input was written", what);
}

void every_small_map() {
  Random random{1};
  for (int64_t h = 1; h <= 9; ++h) {
    for (int64_t w = 1; w <= 9; ++w) {
      round_trip(random, {1, 2, 3, h, w}, IRT_F32, Memory::nchw, Memory::nchw, Memory::nchw, "small");
    }
  }
}

// Channels around the widths of vectors, rows around them, too.
void every_layout_and_format() {
  Random random{2};
  const int64_t channels[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 35}, widths[] = {1, 2, 7, 8, 15, 16, 17, 33};
  for (int dtype : kDtypes) {
    for (int round = 0; round < 40; ++round) {
      const Dims d{random.between(1, 2), channels[random.between(0, 10)], channels[random.between(0, 10)],
                   random.between(1, 9), widths[random.between(0, 7)]};
      const auto in = static_cast<Memory>(round % 4), out = static_cast<Memory>(random.between(0, 2));
      round_trip(random, d, dtype, in, static_cast<Memory>(random.between(0, 3)), out, "layouts", round % 3 == 0);
      if (round % 4 < 2) round_trip(random, d, dtype, in, Memory::nchw, in, "dense");
    }
  }
}

// Powers of two, primes of every pass, products of them, and lengths that need a chirp.
void every_kind_of_length() {
  Random random{3};
  for (int64_t n : {32, 64, 128, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 127, 22, 45, 98, 121, 134}) {
    round_trip(random, {1, 2, 1, n, 3}, IRT_F32, Memory::nhwc, Memory::nchw, Memory::nhwc, "column");
    round_trip(random, {1, 1, 2, 2, n}, IRT_F32, Memory::nchw, Memory::nchw, Memory::nchw, "row");
  }
  check::note("float32: at most %.2f of %.2f units", largest, kUnits);
}

// Everything absent or present; each must count.
void optional_arguments() {
  Random random{4};
  const Call call(random, {2, 5, 4, 6, 5}, IRT_F32, Memory::nchw, Memory::nchw);
  for (int which = 0; which < 4; ++which) {
    const Inputs inputs = call.inputs(which & 1, which & 2);
    const Tensor out(random, IRT_F32, call.out_shape(), Memory::nchw);
    CHECK(call_kernel(inputs, out, 1).code == IRT_OK, "case %d", which);
    check_against(truth_of(call.d, inputs), call.d, inputs, out, "optional");
  }
}

// They are one dtype, x's or float32.
void weights_of_other_dtypes() {
  Random random{8};
  const Dims d{1, 3, 2, 4, 5};
  for (int dtype : kDtypes) {
    for (int of_weight : kDtypes) {
      for (int of_bias : kDtypes) {
        const Call call(random, d, dtype, Memory::nchw, Memory::nchw);
        const Tensor weight(random, of_weight, {{4, 6, 1, 1}}, Memory::nchw),
            bias(random, of_bias, {{4, 1, 1, 1}}, Memory::nchw), out(random, dtype, call.out_shape(), Memory::nchw);
        const bool fits = of_weight == of_bias && (of_weight == dtype || of_weight == IRT_F32);
        const irt_status status = call_kernel({call.x, weight, &bias, nullptr}, out, 1);
        CHECK(status.code == (fits ? IRT_OK : IRT_BAD_ARGUMENT), "%s by %s, %s: %d", kNames[dtype], kNames[of_weight],
              kNames[of_bias], status.code);
      }
    }
  }
}

bool same_numbers(const Tensor& a, const Tensor& b) {
  bool same = true;
  a.for_each(
      [&](int64_t n, int64_t c, int64_t y, int64_t x) { same = same && a.get(n, c, y, x) == b.get(n, c, y, x); });
  return same;
}

// Large enough that every stage is shared; the shares must not show in a single bit.
void shares_of_threads() {
  Random random{5};
  const struct {
    int dtype;
    Memory memory;
  } cases[] = {{IRT_F32, Memory::nchw}, {IRT_F32, Memory::nhwc}, {IRT_F16, Memory::random}, {IRT_BF16, Memory::nhwc}};
  for (const auto& c : cases) {
    const Call call(random, {2, 18, 19, 36, 37}, c.dtype, c.memory, c.memory);
    const Tensor alone(random, c.dtype, call.out_shape(), c.memory);
    CHECK(call_kernel(call.inputs(), alone, 1).code == IRT_OK, "one thread");
    if (c.memory == Memory::nchw)
      check_against(truth_of(call.d, call.inputs()), call.d, call.inputs(), alone, "threads");
    for (int threads : {2, 3, INT_MAX, INT_MIN}) {
      const Tensor out(random, c.dtype, call.out_shape(), c.memory);
      const irt_status status = call_kernel(call.inputs(), out, threads);
      CHECK(status.code == IRT_OK, "%d threads: %s", threads, status.message);
      CHECK(same_numbers(alone, out), "%s: %d threads give other bits than one", kNames[c.dtype], threads);
      CHECK(out.canaries_live(), "%d threads: written beside the output", threads);
    }
  }
}

void empty_batch_without_memory() {
  Random random{6};
  for (int dtype : kDtypes) {
    const Call call(random, {0, 3, 2, 4, 5}, dtype, Memory::nchw, Memory::nchw);
    const Tensor out(random, dtype, call.out_shape(), Memory::nchw);
    const irt_status status = call_kernel(call.inputs(), out, 2);
    CHECK(status.code == IRT_OK, "%s: %s", kNames[dtype], status.message);
  }
}

// A NaN reaches every output of its sample, through the rectification, and none of another sample.
void nan_stays_in_its_sample() {
  Random random{7};
  for (int dtype : kDtypes) {
    Call call(random, {3, 5, 6, 7, 8}, dtype, Memory::nhwc, Memory::nchw);
    const Tensor before(random, dtype, call.out_shape(), Memory::nchw),
        out(random, dtype, call.out_shape(), Memory::nchw);
    CHECK(call_kernel(call.inputs(), before, 1).code == IRT_OK, "numbers");
    call.x.set(1, 2, 3, 4, NAN);
    CHECK(call_kernel(call.inputs(), out, 1).code == IRT_OK, "a NaN");
    out.for_each([&](int64_t b, int64_t c, int64_t y, int64_t x) {
      const double got = out.get(b, c, y, x);
      CHECK(b == 1 ? std::isnan(got) : got == before.get(b, c, y, x), "%s: sample %lld has %g beside a NaN in sample 1",
            kNames[dtype], static_cast<long long>(b), got);
    });
  }
}

// ---- no memory
// -------------------------------------------------------------------------------------------------------

void a_refusal_by_the_system_is_reported() {
  Random random{8};
  const Call call(random, {1, 3, 2, 4, 5}, IRT_F32, Memory::nchw, Memory::nchw);
  const Tensor out(random, IRT_F32, call.out_shape(), Memory::nchw);
  const std::vector<unsigned char> before = out.bytes();
  irt_empty_cache();
  refuse_maps = true;
  irt_status status = call_kernel(call.inputs(), out, 2);
  refuse_maps = false;
  CHECK(status.code == IRT_OUT_OF_MEMORY && *status.message, "status %d '%s'", status.code, status.message);
  CHECK(out.bytes() == before, "the output was written without memory to compute it in");
  CHECK(irt_arena_bytes() == 0, "%lld bytes held", static_cast<long long>(irt_arena_bytes()));
  status = call_kernel(call.inputs(), out, 2);
  CHECK(status.code == IRT_OK && !*status.message, "status %d '%s'", status.code, status.message);
}

// Tensors expanded from one number may claim sizes whose workspace cannot even be computed.
void sizes_beyond_all_memory() {
  float number = 1.0f;
  constexpr int64_t one = 1;
  const Dims all[] = {{1, 1, 1, 1, one << 60},         {1, 1, 1, one << 60, 1},         {1, 1, 1, one << 30, one << 30},
                      {1, one << 58, 1, 1, 1},         {1, 1, one << 58, 1, 1},         {1, one << 29, one << 29, 1, 1},
                      {1, one << 28, 1, one << 16, 2}, {1, 1, one << 28, 3, one << 16}, {1, 1, 1, 1, (one << 28) + 1},
                      {1, 3, 3, one << 20, one << 20}, {1, one << 20, one << 21, 1, 1}};
  for (const Dims& d : all) {
    const irt_view x{&number, IRT_F32, 4, {d.b, d.c, d.h, d.w}, {}},
        weight{&number, IRT_F32, 2, {2 * d.co, 2 * d.c}, {}};
    const irt_view out{&number, IRT_F32, 4, {d.b, d.co, d.h, d.w}, {}};
    const irt_value args[] = {value(x), value(weight), none(), none()};
    for (int threads : {1, INT_MAX}) {
      const irt_call call = call_of(args, 4, &out, 1, threads);
      irt_status status;
      irt_cpu_find("fourier_unit")(&call, &status);
      CHECK(status.code == IRT_OUT_OF_MEMORY && number == 1.0f, "%lld to %lld channels of %lldx%lld: status %d '%s'",
            static_cast<long long>(d.c), static_cast<long long>(d.co), static_cast<long long>(d.h),
            static_cast<long long>(d.w), status.code, status.message);
    }
  }
}

// ---- wrong calls
// -----------------------------------------------------------------------------------------------------

// A correct call with everything it points to, so that faults can be put anywhere.
enum Place { kOut, kX, kWeight, kBias, kResidual, kPlaces };

struct Subject {
  static constexpr int64_t kRoom = 64;  // floats of each tensor
  float memory[kPlaces * kRoom];
  irt_view views[kPlaces] = {{nullptr, IRT_F32, 4, {2, 3, 2, 3}, {18, 6, 3, 1}},
                             {nullptr, IRT_F32, 4, {2, 2, 2, 3}, {12, 6, 3, 1}},
                             {nullptr, IRT_F32, 4, {6, 4, 1, 1}, {4, 1, 1, 1}},
                             {nullptr, IRT_F32, 1, {6}, {1}},
                             {nullptr, IRT_F32, 4, {2, 3, 2, 3}, {18, 6, 3, 1}}};
  irt_value args[6];
  irt_call call;

  Subject() {
    for (float& x : memory) x = 0.5f;
    for (int i = 0; i < kPlaces; ++i) views[i].data = memory + i * kRoom;
    for (int i = 0; i < 4; ++i) args[i] = value(views[kX + i]);
    args[4] = args[5] = none();
    call = call_of(args, 4, views, 1, 2);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  // The status of the call; nothing that memory holds may have changed when it is not OK.
  irt_status answer() {
    irt_status status;
    memset(&status, 0x7e, sizeof status);  // as uninitialised memory is
    float before[kPlaces * kRoom];
    memcpy(before, memory, sizeof before);
    irt_cpu_find("fourier_unit")(&call, &status);
    CHECK(status.code == IRT_OK || !memcmp(before, memory, sizeof before), "memory changed beside an error");
    CHECK(status.code >= IRT_OK && status.code <= IRT_DEVICE_ERROR, "status %d", status.code);
    CHECK(memchr(status.message, 0, sizeof status.message), "a message without an end");
    return status;
  }
};

struct Fault {
  const char* name;
  std::function<void(Subject&)> apply;
  int code;
};

std::vector<Fault> faults() {
  std::vector<Fault> all;
  const auto add = [&all](const char* name, std::function<void(Subject&)> apply, int code = IRT_BAD_ARGUMENT) {
    all.push_back({name, std::move(apply), code});
  };
  for (int count : {0, 1, 2, 3, 5, 6, -1, INT_MIN}) {
    add("number of arguments", [count](Subject& s) { s.call.nargs = count; });
  }
  for (int count : {0, 2, -1, INT_MIN}) add("number of outputs", [count](Subject& s) { s.call.nouts = count; });
  add("null arguments", [](Subject& s) { s.call.args = nullptr; });
  add("null outputs", [](Subject& s) { s.call.outs = nullptr; });
  for (int i = 0; i < 4; ++i) {
    for (int kind : {-1, 7, INT_MAX}) add("unknown kind", [i, kind](Subject& s) { s.args[i].kind = kind; });
    add("null tensor", [i](Subject& s) { s.args[i].tensors = nullptr; });
    add("a list for a tensor", [i](Subject& s) { s.args[i] = list(s.views[kX + i], 1); });
    add("a number for a tensor", [i](Subject& s) { s.args[i] = value(1.0); });
    add("a string for a tensor", [i](Subject& s) { s.args[i] = value("x"); });
    if (i < 2) add("absent tensor", [i](Subject& s) { s.args[i] = none(); });
  }
  for (int place = 0; place < kPlaces; ++place) {
    const auto of = [place](std::function<void(irt_view&)> f) { return [place, f](Subject& s) { f(s.views[place]); }; };
    const Subject right;
    add("null data", of([](irt_view& v) { v.data = nullptr; }));
    for (int dtype : {-1, 8, INT_MAX}) add("unknown dtype", of([dtype](irt_view& v) { v.dtype = dtype; }));
    for (int dtype : {IRT_F16, IRT_F64, IRT_U8}) add("another dtype", of([dtype](irt_view& v) { v.dtype = dtype; }));
    for (int ndim : {-1, INT_MIN, 0, 1, 2, 3, 5, 7, INT_MAX}) {
      if (ndim == right.views[place].ndim || (place == kWeight && (ndim == 2 || ndim == 3))) continue;  // correct
      add("rank, or size", of([ndim](irt_view& v) { v.ndim = ndim; }));
    }
    for (int d = 0; d < right.views[place].ndim; ++d) {
      for (int64_t size : {int64_t{-1}, INT64_MIN, INT64_MAX, INT64_MAX / 2 + 1, int64_t{0}, int64_t{7}, int64_t{8}}) {
        add("size", of([d, size](irt_view& v) { v.sizes[d] = size; }));
      }
      if (right.views[place].sizes[d] == 1) continue;  // its stride is never used
      for (int64_t stride : {INT64_MAX, INT64_MIN, INT64_MIN + 1}) {
        add("stride", of([d, stride](irt_view& v) { v.strides[d] = stride; }));
      }
    }
  }
  for (int d = 1; d < 4; ++d) {
    add("size 0 everywhere", [d](Subject& s) {
      for (int place : {kOut, kX, kResidual}) s.views[place].sizes[d] = 0;
      if (d == 1) s.views[kWeight].sizes[0] = s.views[kWeight].sizes[1] = s.views[kBias].sizes[0] = 0;
    });
  }
  add("size of the weight, transposed",
      [](Subject& s) { std::swap(s.views[kWeight].sizes[0], s.views[kWeight].sizes[1]); });
  add("size of an odd weight", [](Subject& s) { s.views[kWeight].sizes[0] = s.views[kBias].sizes[0] = 7; });
  for (int dtype : {IRT_F64, IRT_I32, IRT_I64, IRT_U8, IRT_BOOL}) {
    add(
        "a dtype there is no kernel for",
        [dtype](Subject& s) {
          for (irt_view& v : s.views) v.dtype = dtype;
        },
        IRT_UNSUPPORTED);
  }
  return all;
}

void one_fault() {
  Subject right;
  const irt_status accepted = right.answer();
  CHECK(accepted.code == IRT_OK && !*accepted.message, "%d %s", accepted.code, accepted.message);
  CHECK(right.memory[0] != 0.5f, "a correct call did nothing");
  const std::vector<Fault> all = faults();
  for (const Fault& fault : all) {
    Subject s;
    fault.apply(s);
    const irt_status status = s.answer();
    CHECK(status.code == fault.code, "%s: status %d '%s'", fault.name, status.code, status.message);
    CHECK(*status.message, "%s: no message", fault.name);
  }
  check::note("%zu calls", all.size());
}

// A second fault must not hide the first one's guard. (Two faults of size may make a correct call of tensors that are
// not there, which no kernel can see; they are left out.)
void two_faults() {
  const std::vector<Fault> all = faults();
  for (const Fault& first : all) {
    for (const Fault& second : all) {
      if (strstr(first.name, "size") && strstr(second.name, "size")) continue;
      Subject s;
      first.apply(s);
      second.apply(s);
      const irt_status status = s.answer();
      CHECK(status.code == IRT_OK || *status.message, "%s and %s: no message", first.name, second.name);
    }
  }
  check::note("%zu calls", all.size() * all.size());
}

}  // namespace

const check::Case check::cases[] = {
    {"every small map", every_small_map},
    {"every layout and format", every_layout_and_format},
    {"every kind of length", every_kind_of_length},
    {"optional arguments", optional_arguments},
    {"weights of other dtypes", weights_of_other_dtypes},
    {"shares of threads", shares_of_threads},
    {"empty batch without memory", empty_batch_without_memory},
    {"NaN stays in its sample", nan_stays_in_its_sample},
    {"a refusal by the system is reported", a_refusal_by_the_system_is_reported},
    {"sizes beyond all memory", sizes_beyond_all_memory},
    {"one fault", one_fault},
    {"two faults", two_faults},
    {nullptr, nullptr},
};
