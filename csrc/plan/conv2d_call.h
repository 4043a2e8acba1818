// How a call of a convolution op becomes launches: what the planners of the ops share. Arguments are read as the CPU
// kernels read them (csrc/cpu/conv_call.h); limits that only the CPU's engine has are not asked for.
#pragma once

#include <utility>

#include "conv2d.h"
#include "plan.h"

#include "conv_call.h"

namespace irt::plan::conv2d {

using conv::Call;

constexpr int64_t kMostSize = int64_t{1} << 28;  // of sides and reaches, so that sums of some of them fit into an int
const char* const kTooLarge = "the tensors have more elements than one launch can cover";

// A call, and what the CPU's has not.
struct Arguments {
  Call call{};
  irt_view second{};  // channels that follow those of call.x; without dimensions: none
  irt_view all{};     // call.weight, as if it were of one group
  irt_view weight{};
  int64_t groups = 1;
};

inline const char* read_image(const irt_value& x, const irt_value* second, Arguments& a) {
  if (const char* fault = conv::read_image(x, a.call)) return fault;
  const irt_view* more = second ? conv::optional(*second) : nullptr;
  if (!more) return nullptr;
  bool fits = more->ndim == 4 && more->dtype == a.call.x->dtype;
  for (const int d : {0, 2, 3}) fits = fits && more->sizes[d] == a.call.x->sizes[d];
  if (!fits) return "the parts of x must be 4-D tensors of one dtype and size";
  a.second = *more;
  return nullptr;
}

inline const char* read_weight(const irt_value& value, int64_t groups, Arguments& a) {
  const irt_view* weight = conv::optional(value);
  if (!weight || weight->ndim != 4 || weight->dtype != a.call.x->dtype) return "weight must be 4-D, of x's dtype";
  for (int d = 0; d < 4; ++d) {
    if (weight->sizes[d] < 1) return "weight must not be empty";
    if (weight->sizes[d] > kMostSize) return "weight is too large";
  }
  if (groups < 1 || weight->sizes[0] % groups || groups > kMostSize) return "groups do not fit the weight";
  a.weight = a.all = *weight, a.groups = groups;
  a.all.sizes[1] *= groups;
  a.call.weight = &a.all;
  return nullptr;
}

inline const char* read_geometry(const irt_value& stride, const irt_value& padding, const irt_value& dilation,
                                 Arguments& a) {
  Call& c = a.call;
  if (stride.kind != IRT_INT || stride.i < 1 || stride.i > kMostSize) return "stride must be at least 1";
  if (dilation.kind != IRT_INT || dilation.i < 1 || dilation.i > kMostSize) return "dilation must be at least 1";
  if (padding.kind != IRT_INTS || padding.count != 4) return "padding must be (top, left, bottom, right)";
  c.stride = stride.i, c.dilation = dilation.i, c.upsample = 1;
  c.top = padding.ints[0], c.left = padding.ints[1], c.bottom = padding.ints[2], c.right = padding.ints[3];
  for (int i = 0; i < 4; ++i) {
    if (padding.ints[i] < 0) return "padding must not be negative";
  }
  return nullptr;
}

// As conv::check_sizes, of both parts of x.
inline const char* check_sizes(Arguments& a, int64_t output_padding = 0) {
  irt_view whole = *a.call.x;
  if (a.second.ndim) whole.sizes[1] += a.second.sizes[1];
  Call c = a.call;
  c.x = &whole, c.parts = 1;
  return conv::check_sizes(c, output_padding);
}

// ---- the common parameters -----------------------------------------------------------------------------------------

inline int narrow(int64_t n) { return static_cast<int>(n); }

inline Conv2d::Tensor tensor(const irt_view* view) {
  Conv2d::Tensor t{};
  if (!view) return t;
  t.data = view->data;
  for (int d = 0; d < 4; ++d) t.strides[d] = view->sizes[d] > 1 ? view->strides[d] : 0;
  return t;
}
inline Conv2d::Vector vector(const irt_view* view) {
  return view ? Conv2d::Vector{view->data, view->strides[0]} : Conv2d::Vector{nullptr, 0};
}
inline bool channels_inner(const irt_view& view) { return view.sizes[1] > 1 && view.strides[1] == 1; }

inline int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// i with a · i = 1 modulo m, of which a has no divisor; 0 modulo 1.
inline int64_t inverse(int64_t a, int64_t m) {
  int64_t rest = m, next = a % m, x = 0, y = 1;
  while (next) {
    const int64_t q = rest / next, old = x - q * y;
    x = y, y = old;
    const int64_t left = rest - q * next;
    rest = next, next = left;
  }
  return m == 1 ? 0 : (x % m + m) % m;
}

// Outputs in a tile: those with the least time, if tiles are computed by one processor each, and narrower ones read as
// much of the input as wide ones.
inline int tile_width(Products products, int64_t rows, int64_t others) {
  struct Width {
    int outputs;
    double cost;  // of an output, in a full tile
  };
  static const Width kFma[] = {{64, 1.0}, {16, 2.0}}, kTensor[] = {{128, 1.0}, {64, 1.25}, {16, 3.0}};
  constexpr int64_t kProcessors = 128;  // about as many as the largest GPUs have
  const bool fma = products == Products::ieee;
  int best = 0;
  double least = 0;
  for (int i = 0; i < (fma ? 2 : 3); ++i) {
    const Width& width = fma ? kFma[i] : kTensor[i];
    const int64_t blocks = ceil_div(rows, width.outputs) * others;
    const double time = static_cast<double>(ceil_div(blocks, kProcessors)) * width.outputs * width.cost;
    if (!best || time < least) best = width.outputs, least = time;
  }
  return best;
}

struct Choice {
  Products products;
  int width;
  const char* type;
};

// The parameters, and the launch that packs weights at the workspace's begin; no launch where the output is empty.
inline bool prepare(const Arguments& a, const irt_call& call, Conv2d& p, Choice& choice, irt_plan& plan,
                    irt_status& status) {
  const Call& c = a.call;
  const irt_view &x = *c.x, &out = *c.out;
  const Storage type = storage(x.dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16"), false;
  if (out.sizes[0] == 0) return true;  // no launches: nothing to do
  const int per_pack = type.per_vector;
  choice.type = type.name;
  choice.products = x.dtype != IRT_F32 ? Products::half : call.ieee ? Products::ieee : Products::tf32;

  const bool two = a.second.ndim > 0;
  const int64_t pads[] = {c.top, c.left}, most_pad = most(most(c.top, c.left), most(c.bottom, c.right));
  for (int d = 0; d < 4; ++d) {
    const int64_t reach = d > 1 ? c.dilation * (a.weight.sizes[d] - 1) : 0;
    if (most(most(x.sizes[d], out.sizes[d]), most(reach, most_pad)) > kMostSize) {
      return fail(status, IRT_UNSUPPORTED, kTooLarge), false;
    }
  }
  const bool paired = c.padding != conv::Padding::reflect || most_pad <= 1;
  const bool doubled = c.upsample == 2 && c.stride == 1 && c.dilation == 1 && paired;
  p.form = c.transposed ? Conv2d::kTransposed : doubled ? Conv2d::kDoubled : Conv2d::kPlain;
  p.border = c.padding == conv::Padding::zeros                 ? Conv2d::kZeros
             : c.padding == conv::Padding::reflect && !doubled ? Conv2d::kReflect
                                                               : Conv2d::kReplicate;
  p.halved = c.upsample == 2 && !doubled;
  p.stride = narrow(c.stride), p.dilation = narrow(c.dilation);
  p.shared = narrow(gcd(c.stride, c.dilation));
  p.inverse = narrow(inverse(p.dilation / p.shared, p.stride / p.shared));
  p.period = c.transposed ? p.stride : doubled ? 2 : 1;
  int64_t taps = 1, pixels = x.sizes[0];
  for (int axis = 0; axis < 2; ++axis) {
    p.before[axis] = narrow(pads[axis]);
    p.kernel[axis] = narrow(a.weight.sizes[2 + axis]);
    p.size[axis] = narrow(x.sizes[2 + axis]) * (p.halved ? 2 : 1);
    p.out_size[axis] = narrow(out.sizes[2 + axis]);
    const int64_t step = p.stride / p.shared;
    taps *= c.transposed ? ceil_div(p.kernel[axis], step) : doubled ? p.kernel[axis] / 2 + 1 : p.kernel[axis];
    const int64_t of_phase = ceil_div(p.out_size[axis], p.period);
    pixels *= of_phase;
    (axis ? p.columns : p.rows) = Divisor<int>::of(narrow(of_phase));
  }
  p.groups = narrow(a.groups);
  p.halves = c.gated ? 2 : 1;
  p.outputs = narrow(out.sizes[1] / a.groups);
  p.channels = narrow(c.inputs() / a.groups), p.first_channels = narrow(x.sizes[1]);
  int64_t packs = ceil_div(p.channels, per_pack);
  if (two) packs = a.groups == 1 ? ceil_div(x.sizes[1], per_pack) + ceil_div(a.second.sizes[1], per_pack) : packs + 1;

  const int64_t phases = int64_t{p.period} * p.period, pixel_tiles = ceil_div(pixels, Conv2d::kPixels);
  const int64_t slabs = ceil_div(taps * packs, Conv2d::kPacks), filters = int64_t{p.outputs} * p.halves;
  const bool small = pixels < kNarrow - Conv2d::kPixels && taps * packs < kNarrow - Conv2d::kPacks &&
                     phases * a.groups < kNarrow && pixel_tiles * phases * a.groups < kNarrow;
  if (!small) return fail(status, IRT_UNSUPPORTED, kTooLarge), false;
  choice.width = tile_width(choice.products, filters, pixel_tiles * phases * a.groups);
  const int64_t tiles = ceil_div(filters, choice.width), pieces = phases * p.groups * tiles * slabs;
  if (pixel_tiles * phases * a.groups * tiles > kMaxBlocks || pieces > kMaxBlocks) {
    return fail(status, IRT_UNSUPPORTED, kTooLarge), false;
  }
  p.packs = Divisor<int>::of(narrow(packs));
  p.width = choice.width, p.rounded = choice.products == Products::tf32;
  p.tiles = narrow(tiles), p.slabs = narrow(slabs), p.pixels = narrow(pixels);

  p.parts[0] = tensor(&x), p.parts[1] = tensor(two ? &a.second : nullptr);
  p.mask = tensor(c.mask), p.mask_planes = c.mask && c.mask->sizes[1] > 1;
  p.weight = tensor(&a.weight);
  if (c.transposed) std::swap(p.weight.strides[0], p.weight.strides[1]);
  p.weight_group = c.transposed ? p.channels * p.weight.strides[1] : filters * p.weight.strides[0];
  p.out = out.data;
  for (int d = 0; d < 4; ++d) p.out_strides[d] = out.strides[d];
  p.inner = channels_inner(x), p.out_inner = channels_inner(out);
  for (int i = 0; i < (two ? 2 : 1); ++i) {
    const irt_view& part = i ? a.second : x;
    bool good = channels_inner(part) && aligned(part.data);
    for (const int d : {0, 2, 3}) good = good && p.parts[i].strides[d] % per_pack == 0;
    // Packs begin at multiples of their size from a group's first channel.
    if (p.groups > 1) good = good && p.channels % per_pack == 0 && (!two || p.first_channels % per_pack == 0);
    p.vectors[i] = good;
  }

  // Packed weights: a slab of a tile of outputs is one piece.
  plan.workspace_bytes = pieces * choice.width * Conv2d::kRowBytes;
  irt_launch* const launch = add_launch(plan, pieces * Conv2d::kPackThreads, Conv2d::kPackThreads, status);
  if (!launch) return false;
  snprintf(launch->entry, sizeof launch->entry, "irt::conv2d_pack<%s>", type.name);
  set_params(*launch, p);
  return true;
}

// The launch of the op's own kernel.
template <class Params>
void finish(const char* op, const Params& params, const Choice& choice, irt_plan& plan, irt_status& status) {
  if (!plan.count) return;
  const Conv2d& p = params.conv;
  const int64_t pixel_tiles = ceil_div(p.pixels, Conv2d::kPixels);
  const int threads = Conv2d::threads(choice.width);
  const int64_t blocks = pixel_tiles * p.groups * p.period * p.period * p.tiles;
  irt_launch* const launch = add_launch(plan, blocks * threads, threads, status);
  if (!launch) return;
  const char* const names[] = {"ieee", "tf32", "half"};
  launch->shared_bytes = static_cast<uint32_t>(Conv2d::memory(choice.width));
  snprintf(launch->entry, sizeof launch->entry, "irt::%s<%s, irt::Products::%s, %d>", op, choice.type,
           names[static_cast<int>(choice.products)], choice.width);
  set_params(*launch, params);
}

}  // namespace irt::plan::conv2d
