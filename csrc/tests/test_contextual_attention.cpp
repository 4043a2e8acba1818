// contextual_attention against its definition in double, patch by patch; in every layout and format; wrong calls; and
// that the number of threads changes no bit.
//
// The scale of the softmax is small here: a logit of thousands turns the last bit of a score into another patch, and
// the bound would have to be as wide. What large logits do is tested from Python, against the reference's own error.
#include <functional>
#include <string>
#include <utility>

#include "tensors.h"

namespace {

const int kDtypes[] = {IRT_F32, IRT_F16, IRT_BF16};

struct Options {
  int64_t b, c, h, w;  // of the grid
  bool mask = true, queries = false, offsets = false, propagate = true, aligned = false, sum = false, infinite = false,
       overlap = false;
  int64_t stride = 1;
  double scale = 0.25;

  std::string text() const {
    std::string text = std::to_string(b) + "x" + std::to_string(c) + "x" + std::to_string(h) + "x" + std::to_string(w);
    const struct {
      bool on;
      const char* name;
    } all[] = {{mask, "mask"},   {queries, "queries"}, {offsets, "offsets"}, {propagate, "propagate"}, {aligned, "tf"},
               {sum, "sum_eps"}, {infinite, "neginf"}, {overlap, "overlap"}, {stride > 1, "strided"}};
    for (const auto& option : all) text += option.on ? std::string(" ") + option.name : "";
    return text;
  }
};

// The cell `steps` after (i, j) in row-major order, or in column-major order; −1 outside.
int64_t after(const Options& o, int64_t cell, int64_t steps, bool columns) {
  if (cell < 0) return -1;
  const int64_t i = cell / o.w, j = cell % o.w, at = (columns ? j * o.h + i : cell) + steps;
  if (at < 0 || at >= o.h * o.w) return -1;
  return columns ? at % o.h * o.w + at / o.h : at;
}

// Rows taken of an image of 2·count rows; with aligned corners as TensorFlow rounds, in float32.
int64_t taken(int64_t i, int64_t count, bool aligned) {
  if (!aligned) return 2 * i;
  volatile float step = count > 1 ? static_cast<float>(2 * count - 1) / static_cast<float>(count - 1) : 2.0f;
  volatile float at = static_cast<float>(i) * step;
  volatile float up = at + 0.5f;
  return static_cast<int64_t>(up);
}

struct Truth {
  std::vector<double> out;       // (C, 2h, 2w) of one sample
  std::vector<int64_t> largest;  // key of each cell
};

Truth truth_of(const Options& o, const Tensor& f, const Tensor& g, const Tensor& mask, const Tensor& queries,
               int64_t b) {
  const int64_t cells = o.h * o.w;
  // Patches [cell][channel][tap], and their products.
  const auto patches_of = [&](const Tensor& x) {
    std::vector<double> patches;
    for (int64_t k = 0; k < cells; ++k) {
      for (int64_t c = 0; c < o.c; ++c) {
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t i = k / o.w + t / 3 - 1, j = k % o.w + t % 3 - 1;
          const bool outside = i < 0 || j < 0 || i >= o.h || j >= o.w;
          patches.push_back(outside ? 0.0 : x.get(b, c, taken(i, o.h, o.aligned), taken(j, o.w, o.aligned)));
        }
      }
    }
    return patches;
  };
  const std::vector<double> asking = patches_of(f), asked = patches_of(g);
  const auto product = [&](const std::vector<double>& x, int64_t q, const std::vector<double>& y, int64_t k) {
    const double *left = x.data() + q * 9 * o.c, *right = y.data() + k * 9 * o.c;
    double sum = 0.0;
    for (int64_t n = 0; n < 9 * o.c; ++n) sum += left[n] * right[n];
    return sum;
  };
  std::vector<double> scores(static_cast<size_t>(cells * cells));
  for (int64_t k = 0; k < cells; ++k) {
    const double square = product(asked, k, asked, k), more = static_cast<double>(9 * o.c) * 1e-4;
    const double length = o.sum ? std::sqrt(square + more) : std::fmax(std::sqrt(square), 1e-4);
    for (int64_t q = 0; q < cells; ++q) {
      scores[static_cast<size_t>(q * cells + k)] = product(asking, q, asked, k) / length;
    }
  }
  for (int pass = 0; pass < 2 && o.propagate; ++pass) {
    const std::vector<double> before = scores;
    for (int64_t q = 0; q < cells; ++q) {
      for (int64_t k = 0; k < cells; ++k) {
        double sum = 0.0;
        for (int64_t d = -1; d <= 1; ++d) {
          const int64_t other = after(o, q, d, pass == 1), key = after(o, k, d, pass == 1);
          if (other >= 0 && key >= 0) sum += before[static_cast<size_t>(other * cells + key)];
        }
        scores[static_cast<size_t>(q * cells + k)] = sum;
      }
    }
  }
  Truth truth{std::vector<double>(static_cast<size_t>(o.c * 4 * cells)), {}};
  for (int64_t q = 0; q < cells; ++q) {
    std::vector<double> weights(static_cast<size_t>(cells));
    double total = 0.0, most = -INFINITY;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t k = 0; k < cells; ++k) {
        bool masked = false;
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t i = k / o.w + t / 3 - 1, j = k % o.w + t % 3 - 1;
          masked |= o.mask && i >= 0 && j >= 0 && i < o.h && j < o.w && mask.get(b, 0, i, j) != 0.0;
        }
        if (k / o.w % o.stride || k % o.w % o.stride || (masked && o.infinite)) continue;
        const double logit = masked ? 0.0 : o.scale * scores[static_cast<size_t>(q * cells + k)];
        if (pass == 0) {
          most = std::fmax(most, logit);
        } else {
          total += std::exp(logit - most);
          weights[static_cast<size_t>(k)] = masked ? 0.0 : std::exp(logit - most);
        }
      }
    }
    int64_t best = 0;
    for (int64_t k = 0; k < cells; ++k) {
      const double weight = weights[static_cast<size_t>(k)] / total;
      if (weights[static_cast<size_t>(k)] > weights[static_cast<size_t>(best)]) best = k;
      for (int64_t c = 0; c < o.c; ++c) {  // the 4×4 patch of key k, pasted at cell q
        for (int64_t t = 0; t < 16; ++t) {
          const int64_t sy = 2 * (k / o.w) - 1 + t / 4, sx = 2 * (k % o.w) - 1 + t % 4;
          const int64_t y = 2 * (q / o.w) - 1 + t / 4, x = 2 * (q % o.w) - 1 + t % 4;
          if (sy < 0 || sx < 0 || sy >= 2 * o.h || sx >= 2 * o.w || y < 0 || x < 0 || y >= 2 * o.h || x >= 2 * o.w)
            continue;
          truth.out[static_cast<size_t>((c * 2 * o.h + y) * 2 * o.w + x)] += weight * g.get(b, c, sy, sx);
        }
      }
    }
    truth.largest.push_back(best);
  }
  for (int64_t c = 0; c < o.c; ++c) {
    for (int64_t y = 0; y < 2 * o.h; ++y) {
      for (int64_t x = 0; x < 2 * o.w; ++x) {
        double& v = truth.out[static_cast<size_t>((c * 2 * o.h + y) * 2 * o.w + x)];
        const bool row = y == 0 || y == 2 * o.h - 1, column = x == 0 || x == 2 * o.w - 1;
        v /= o.overlap ? (row ? 1.0 : 2.0) * (column ? 1.0 : 2.0) : 4.0;
        if (o.queries && queries.get(b, 0, y / 2, x / 2) == 0.0) v = 0.0;
      }
    }
  }
  return truth;
}

struct Arguments {
  irt_value values[14];
  Arguments(const Options& o, const Tensor& f, const Tensor& g, const Tensor& mask, const Tensor& queries) {
    const auto number = [](int64_t i) {
      irt_value made{IRT_INT, 1, {}};
      made.i = i;
      return made;
    };
    const irt_value all[14] = {value(f.view()),
                               value(g.view()),
                               o.mask ? value(mask.view()) : none(),
                               number(3),
                               number(o.stride),
                               number(2),
                               number(o.propagate ? 3 : 0),
                               value(o.scale),
                               value(o.aligned ? "tf" : "stride"),
                               value(o.sum ? "sum_eps" : "max"),
                               value(1e-4),
                               value(o.infinite ? "neginf" : "zero"),
                               value(o.overlap ? "overlap" : "const4"),
                               o.queries ? value(queries.view()) : none()};
    memcpy(values, all, sizeof all);
  }
};

// A box of ones in each sample; the rest 0.
void box(Random& random, const Options& o, Tensor& mask) {
  for (int64_t b = 0; b < o.b; ++b) {
    const int64_t top = random.between(0, o.h - 1), left = random.between(0, o.w - 1);
    const int64_t bottom = random.between(top, top + o.h / 3), right = random.between(left, left + o.w / 3);
    for (int64_t i = 0; i < o.h; ++i) {
      for (int64_t j = 0; j < o.w; ++j) mask.set(b, 0, i, j, i >= top && i <= bottom && j >= left && j <= right);
    }
  }
}

void check_call(const Options& o, int dtype, Memory memory, uint64_t seed) {
  Random random{seed};
  const Shape shape{{o.b, o.c, 2 * o.h, 2 * o.w}}, grid{{o.b, 1, o.h, o.w}};
  Tensor f(random, dtype, shape, memory), g(random, dtype, shape, memory),
      out(random, dtype, shape, memory == Memory::expanded ? Memory::random : memory);
  Tensor mask(random, dtype, grid, memory), queries(random, IRT_F32, grid, Memory::nchw);
  f.fill(random), g.fill(random), box(random, o, mask), box(random, o, queries);
  std::vector<int32_t> offsets(static_cast<size_t>(o.b * 2 * o.h * o.w), -99);
  irt_view outs[2] = {out.view(), {}};
  outs[1].data = offsets.data(), outs[1].dtype = IRT_I32, outs[1].ndim = 4;
  const int64_t sizes[4] = {o.b, 2, o.h, o.w}, strides[4] = {2 * o.h * o.w, o.h * o.w, o.w, 1};
  memcpy(outs[1].sizes, sizes, sizeof sizes), memcpy(outs[1].strides, strides, sizeof strides);
  const Arguments arguments(o, f, g, mask, queries);
  const irt_kernel kernel = irt_cpu_find(o.offsets ? "contextual_attention_with_offsets" : "contextual_attention");
  std::vector<unsigned char> first;
  for (int threads : {1, 2, 3}) {
    irt_status status{};
    const irt_call call = call_of(arguments.values, 14, outs, o.offsets ? 2 : 1, threads);
    kernel(&call, &status);
    CHECK(status.code == IRT_OK, "%s", status.message);
    if (threads == 1) first = out.bytes();
    CHECK(first == out.bytes(), "%d threads give other bits", threads);
  }
  CHECK(out.canaries_live(), "memory beside the output was written");
  for (int64_t b = 0; b < o.b; ++b) {
    const Truth truth = truth_of(o, f, g, mask, queries, b);
    double worst = 0.0, share = 0.0;
    out.for_each([&](int64_t sample, int64_t c, int64_t y, int64_t x) {
      if (sample != b) return;
      const double want = truth.out[static_cast<size_t>((c * 2 * o.h + y) * 2 * o.w + x)];
      // Weights carry the error of logits (up to 1e2, so 1e-5), values are at most 16.
      const double error = std::fabs(out.get(b, c, y, x) - want), bound = 5e-5 + half_unit(want, dtype);
      if (!(error <= share * bound)) worst = error, share = error / bound;
    });
    CHECK(share <= 1.0, "%s: sample %d is off by %g, %g of what is allowed", o.text().c_str(), static_cast<int>(b),
          worst, share);
    for (int64_t q = 0; o.offsets && q < o.h * o.w; ++q) {
      const int64_t at = b * 2 * o.h * o.w + q, key = truth.largest[static_cast<size_t>(q)];
      const int64_t row = offsets[static_cast<size_t>(at)] + q / o.w,
                    column = offsets[static_cast<size_t>(at + o.h * o.w)] + q % o.w;
      CHECK(row == key / o.w && column == key % o.w, "cell %d points to (%d, %d), not to %d", static_cast<int>(q),
            static_cast<int>(row), static_cast<int>(column), static_cast<int>(key));
    }
  }
}

void grids() {
  const int64_t sizes[][2] = {{1, 1}, {1, 2}, {2, 1}, {1, 9}, {9, 1}, {2, 2}, {3, 3}, {5, 4}, {4, 7}, {2, 40}, {21, 2}};
  uint64_t seed = 1;
  for (const auto& size : sizes) {
    for (int64_t c : {1, 5, 33}) {
      Options o{2, c, size[0], size[1]};
      for (int dtype : kDtypes) check_call(o, dtype, seed % 2 ? Memory::nchw : Memory::nhwc, seed), ++seed;
      o.offsets = true, check_call(o, IRT_F32, Memory::random, seed++);
    }
  }
}

void options() {
  uint64_t seed = 100;
  for (int bits = 0; bits < 256; ++bits) {
    Options o{bits % 3 ? 1 : 2, 3, 5, 6};
    o.mask = bits & 1, o.queries = bits & 2, o.propagate = bits & 4, o.aligned = bits & 8;
    o.sum = bits & 16, o.infinite = bits & 32, o.overlap = bits & 64, o.stride = bits & 128 ? 2 : 1;
    o.offsets = bits % 5 == 0;
    check_call(o, IRT_F32, static_cast<Memory>(bits % 4), seed++);
  }
}

// Wide grids of many channels are cut into strips, whose halos and wraps have to meet.
void strips() {
  uint64_t seed = 1000;
  for (const auto& size : {std::pair<int64_t, int64_t>(3, 17), {2, 43}}) {
    Options o{1, 300, size.first, size.second};  // too many channels for the budget: strips of 16 columns
    o.scale = 0.03;
    check_call(o, IRT_F32, Memory::nchw, seed++);
    o.queries = true;
    check_call(o, IRT_F32, Memory::nhwc, seed++);
  }
}

void wrong_calls() {
  Random random{7};
  const Options o{1, 3, 4, 4};
  const Shape shape{{1, 3, 8, 8}}, grid{{1, 1, 4, 4}};
  Tensor f(random, IRT_F32, shape, Memory::nchw), out(random, IRT_F32, shape, Memory::nchw);
  Tensor mask(random, IRT_F32, grid, Memory::nchw), odd(random, IRT_F32, Shape{{1, 3, 8, 7}}, Memory::nchw);
  f.fill(random), box(random, o, mask);
  const auto refused = [&](int code, const std::function<void(irt_value*)>& spoil) {
    Arguments arguments(o, f, f, mask, mask);
    spoil(arguments.values);
    irt_status status{};
    const irt_call call = call_of(arguments.values, 14, &out.view(), 1, 1);
    irt_cpu_find("contextual_attention")(&call, &status);
    CHECK(status.code == code, "status %d: %s", status.code, status.message);
  };
  const auto whole = [](int64_t i) {
    irt_value made{IRT_INT, 1, {}};
    made.i = i;
    return made;
  };
  refused(IRT_OK, [](irt_value*) {});
  refused(IRT_BAD_ARGUMENT, [](irt_value* a) { a[0] = none(); });
  refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[1] = value(odd.view()); });
  refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[2] = value(f.view()); });
  refused(IRT_UNSUPPORTED, [&](irt_value* a) { a[3] = whole(5); });
  refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[4] = whole(0); });
  refused(IRT_UNSUPPORTED, [&](irt_value* a) { a[5] = whole(3); });
  refused(IRT_UNSUPPORTED, [&](irt_value* a) { a[6] = whole(5); });
  refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[7] = value("ten"); });
  for (int i : {8, 9, 11, 12}) refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[i] = value("other"); });
  refused(IRT_BAD_ARGUMENT, [&](irt_value* a) { a[13] = value(f.view()); });
}

}  // namespace

const check::Case check::cases[] = {
    {"grids", grids}, {"options", options}, {"strips", strips}, {"wrong calls", wrong_calls}, {nullptr, nullptr}};
