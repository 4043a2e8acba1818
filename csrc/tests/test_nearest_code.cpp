// nearest_code against a plain double loop: formats, strides, one half and two, threads, ties; wrong calls.
//
// Where two codes are nearly as near, either may be found: the found one's distance must be the least to within kUnits
// of float's rounding unit on the terms of |x − c|² = |x|² − 2·x·c + |c|².
#include "tensors.h"

namespace {

constexpr double kUnits = 16.0, kFloatUnit = 0x1p-24;

irt_value integer(int64_t i) {
  irt_value v{};
  v.kind = IRT_INT;
  v.i = i;
  return v;
}

// The matrix of rows (b, h) and columns (c) of a tensor (B, C, H, 1): in NHWC its columns are neighbours.
irt_view matrix(const Tensor& t) {
  irt_view view = t.view();
  view.ndim = 2;
  view.sizes[0] = t.view().sizes[2];
  view.strides[0] = t.view().strides[2];
  return view;
}

struct Call {
  int64_t n, codes, depth, split;  // split 0: one half
  Tensor x, book;
  irt_view x_view, book_view, known_view{}, out_view{};
  std::vector<unsigned char> known;
  std::vector<int64_t> out;
  irt_value args[4];

  Call(Random& random, int dtype, int64_t n, int64_t codes, int64_t depth, int64_t split, Memory memory)
      : n(n),
        codes(codes),
        depth(depth),
        split(split),
        x(random, dtype, {{1, depth, n, 1}}, memory),
        book(random, dtype, {{1, depth, codes, 1}}, memory),
        x_view(matrix(x)),
        book_view(matrix(book)),
        known(static_cast<size_t>(n)),
        out(static_cast<size_t>(n) + 2, -5) {
    x.fill(random);
    book.fill(random);
    for (unsigned char& k : known) k = static_cast<unsigned char>(random.between(0, 1));
    known_view.data = known.data();
    known_view.dtype = IRT_BOOL;
    known_view.ndim = 1;
    known_view.sizes[0] = n;
    known_view.strides[0] = 1;
    out_view.data = out.data() + 1;
    out_view.dtype = IRT_I64;
    out_view.ndim = 1;
    out_view.sizes[0] = n;
    out_view.strides[0] = 1;
    args[0] = value(x_view);
    args[1] = value(book_view);
    args[2] = split ? integer(split) : none();
    args[3] = split ? value(known_view) : none();
  }
  irt_status run(int threads) const {
    const irt_call call = call_of(args, 4, &out_view, 1, threads);
    irt_status status;
    irt_cpu_find("nearest_code")(&call, &status);
    return status;
  }
  // |x − c|² and the magnitudes of what it is computed from.
  double distance(int64_t i, int64_t code, double& size) const {
    double sum = 0.0;
    size = 0.0;
    for (int64_t d = 0; d < depth; ++d) {
      const double a = x.get(0, d, i, 0), b = book.get(0, d, code, 0);
      sum += (a - b) * (a - b);
      size += a * a + b * b + 2.0 * std::fabs(a * b);
    }
    return sum;
  }
};

void least_distances() {
  Random random{21};
  for (int dtype : {IRT_F32, IRT_F16, IRT_BF16}) {
    for (int round = 0; round < 12; ++round) {
      const int64_t codes = random.between(2, 300), split = random.between(0, 1) ? random.between(1, codes - 1) : 0;
      Call call(random, dtype, random.between(1, 70), codes, random.between(1, 70), split,
                static_cast<Memory>(random.between(0, 2)));
      const std::vector<unsigned char> before[] = {call.x.bytes(), call.book.bytes()};
      const irt_status status = call.run(round % 3 + 1);
      CHECK(status.code == IRT_OK, "%s", status.message);
      CHECK(call.out.front() == -5 && call.out.back() == -5, "written beside the output");
      CHECK(call.x.bytes() == before[0] && call.book.bytes() == before[1], "an input was written");
      for (int64_t i = 0; i < call.n; ++i) {
        const bool known = split && call.known[static_cast<size_t>(i)];
        const int64_t begin = split && !known ? split : 0, end = known ? split : codes;
        const int64_t found = call.out[static_cast<size_t>(i) + 1];
        CHECK(found >= begin && found < end, "code %d of the wrong half", static_cast<int>(found));
        if (found < begin || found >= end) continue;
        double size, other;
        const double got = call.distance(i, found, size);
        for (int64_t code = begin; code < end; ++code) {
          const double d = call.distance(i, code, other);
          const double allowed = kUnits * kFloatUnit * (size + other);
          CHECK(got <= d + allowed && (code >= found || d > got - allowed), "code %d at %.9g, %d is at %.9g",
                static_cast<int>(found), got, static_cast<int>(code), d);
        }
      }
    }
  }
}

void of_equal_codes_the_first() {
  Random random{22};
  for (int threads : {1, 2, 7}) {
    Call call(random, IRT_F32, 9, 4000, 64, 0, Memory::nhwc);
    call.book.for_each([&](int64_t b, int64_t d, int64_t code, int64_t w) {
      call.book.set(b, d, code, w, static_cast<double>(d % 5) - (code % 1000 == 17 ? 0.0 : 8.0));
    });
    call.x.for_each(
        [&](int64_t b, int64_t d, int64_t i, int64_t w) { call.x.set(b, d, i, w, static_cast<double>(d % 5)); });
    CHECK(call.run(threads).code == IRT_OK, "%d threads", threads);
    for (size_t i = 1; i <= 9; ++i) CHECK(call.out[i] == 17, "code %d, not the first", static_cast<int>(call.out[i]));
  }
}

void wrong_calls() {
  Random random{23};
  const struct {
    const char* name;
    void (*spoil)(Call&);
  } faults[] = {
      {"no vectors", [](Call& c) { c.args[0] = none(); }},
      {"vectors of another depth", [](Call& c) { c.x_view.sizes[1] = 4; }},
      {"no depth", [](Call& c) { c.x_view.sizes[1] = c.book_view.sizes[1] = 0; }},
      {"no codes", [](Call& c) { c.book_view.sizes[0] = 0; }},
      {"codes of another type", [](Call& c) { c.book_view.dtype = IRT_F16; }},
      {"split without known", [](Call& c) { c.args[3] = none(); }},
      {"known without split", [](Call& c) { c.args[2] = none(); }},
      {"a half without codes", [](Call& c) { c.args[2] = integer(0); }},
      {"another half without codes", [](Call& c) { c.args[2] = integer(c.codes); }},
      {"known of other vectors", [](Call& c) { c.known_view.sizes[0] = 5; }},
      {"known of integers", [](Call& c) { c.known_view.dtype = IRT_I64; }},
      {"an output of floats", [](Call& c) { c.out_view.dtype = IRT_F32; }},
      {"an output that is too short", [](Call& c) { c.out_view.sizes[0] = 5; }},
      {"an output with gaps", [](Call& c) { c.out_view.strides[0] = 2; }},
  };
  for (const auto& fault : faults) {
    Call call(random, IRT_F32, 6, 20, 5, 8, Memory::nchw);
    fault.spoil(call);
    const std::vector<int64_t> before = call.out;
    const irt_status status = call.run(1);
    CHECK(status.code == IRT_BAD_ARGUMENT && *status.message, "%s: status %d", fault.name, status.code);
    CHECK(call.out == before, "%s: the output was written", fault.name);
  }
}

}  // namespace

const check::Case check::cases[] = {
    {"least distances", least_distances},
    {"of equal codes the first", of_equal_codes_the_first},
    {"wrong calls", wrong_calls},
    {nullptr, nullptr},
};
