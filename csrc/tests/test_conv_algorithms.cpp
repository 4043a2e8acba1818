// Each algorithm of the convolution engine (conv_algorithms.h) on the calls that it covers, whether or not the planner
// would choose it; and Winograd's transforms by themselves. Compiled once per instruction set.
//
// Workspaces are exactly as large as was asked for, so that AddressSanitizer sees their ends, and hold NaN at first, so
// that reading what nobody has written shows (guarded_workspace.h).
#include "conv_algorithms.h"

#include "check.h"
#include "convolution.h"
#include "gemm.h"
#include "guarded_workspace.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA {
namespace {

constexpr int64_t W = Vec::kWidth;

// The engine's call for a setting of fused_conv2d or gated_conv2d.
conv::Call engine_call(const Convolution& c, const Convolution::Arguments& a, irt_view (&parts)[2], conv::Call& beside,
                       int threads) {
  const Setting& s = c.s;
  const auto view = [](const irt_value& v) { return v.kind == IRT_TENSOR ? v.tensors : nullptr; };
  const bool gated = s.op == Op::gated;
  conv::Call call{};
  call.x = view(a.values[0]), call.parts = 1, call.out = &a.outs[0];
  if (s.first) {
    parts[0] = *call.x, parts[1] = *view(a.values[18]);
    call.x = parts, call.parts = 2;
    if (s.apart) call.rest = view(a.values[19]);
  }
  call.weight = view(a.values[1]), call.bias = view(a.values[2]);
  if (!gated) {
    call.mask = view(a.values[8]), call.scale = view(a.values[12]), call.shift = view(a.values[13]);
    call.residual = view(a.values[16]);
  }
  call.stride = s.stride, call.dilation = s.dilation, call.upsample = s.upsample;
  call.top = s.pads[0], call.left = s.pads[1], call.bottom = s.pads[2], call.right = s.pads[3];
  call.padding = !strcmp(s.mode, "zeros")     ? conv::Padding::zeros
                 : !strcmp(s.mode, "reflect") ? conv::Padding::reflect
                                              : conv::Padding::replicate;
  call.transposed = s.transposed, call.gated = gated;
  parse_activation(s.activation, call.act);
  call.alpha = static_cast<float>(std::isnan(s.alpha) ? default_alpha(call.act) : s.alpha);
  call.gain = static_cast<float>(s.gain);
  call.residual_first = s.residual == Residual::before;
  call.threads = threads;
  if (s.beside) {
    beside = {};
    beside.x = view(a.values[18]), beside.parts = 1, beside.weight = view(a.values[19]), beside.out = call.out;
    beside.stride = beside.dilation = beside.upsample = 1;
    call.beside = &beside;
  }
  return call;
}

struct Algorithm {
  const char* name;
  void (*run)(const conv::Call&, irt_status&);
  int64_t kernel;  // or 0: any
  bool spreads;    // see convolution.h
  double units;
  int64_t taps = 0;   // of the largest phase, if it goes by phases
  bool rows = false;  // whether the filter may have any height

  bool adds_beside() const { return kernel > 1 && !taps && !rows; }
};
const Algorithm kAlgorithms[] = {
    {"direct", conv::direct, 0, false, kDirectUnits},
    {"planar", conv::planar, 0, false, kDirectUnits},
    {"columns", conv::columns, 0, false, kDirectUnits},
    {"pointwise", conv::pointwise, 1, false, kDirectUnits},
    {"F(4x4, 3x3)", conv::winograd_f43, 3, true, kWinogradUnits},
    {"F(2x2, 3x3)", conv::winograd_f23, 3, true, kWinogradIeeeUnits},
    {"F(2x2, 5x5)", conv::winograd_f25, 5, true, kWinogradUnits},
    {"F(4, 5) along rows", conv::rows_f45, 5, true, kWinogradUnits, 0, true},
    {"F(2, 7) along rows", conv::rows_f27, 7, true, kWinogradUnits, 0, true},
    {"F(4x4, 2x2) by phases", conv::winograd_f42_phases, 3, true, kWinogradUnits, 2},
    {"F(4x4, 3x3) by phases", conv::winograd_f43_phases, 5, true, kWinogradUnits, 3},
};

double largest = 0.0;

bool goes_by_phases(const conv::Call& call, int64_t taps) {
  return conv::Tiling::halves(call) && conv::Tiling(call, 0, true).fits(taps) && conv::Tiling(call, 1, true).fits(taps);
}

void check_algorithm(const Algorithm& algorithm, Random& random, const Setting& setting, int threads = 1) {
  const Convolution c(random, setting);
  const Convolution::Arguments arguments(c);
  irt_view parts[2];
  conv::Call beside;
  const conv::Call call = engine_call(c, arguments, parts, beside, threads);
  CHECK(!algorithm.taps || goes_by_phases(call, algorithm.taps), "%s does not cover %s", algorithm.name,
        setting.text().c_str());
  irt_status status{};
  algorithm.run(call, status);
  CHECK(status.code == IRT_OK, "%s, %s: status %d '%s'", algorithm.name, setting.text().c_str(), status.code,
        status.message);
  largest = std::max(largest, check_result(c, c.truth(algorithm.spreads), algorithm.units, algorithm.name));
}

// A kernel and what makes two phases of it, of as many taps as the algorithm has.
void halve(Setting& s, int64_t taps, Random& random) {
  const auto longest = [&] { return 2 * taps - random.between(0, 1); };
  const int64_t kind = s.op == Op::gated ? 0 : random.between(0, 2);
  s.kh = longest(), s.kw = longest(), s.dilation = s.upsample = 1, s.stride = 2, s.transposed = kind == 1;
  if (kind != 1) s.output_padding = 0;
  if (kind == 1) s.mode = kModes[0], s.output_padding = random.between(0, 1);
  if (kind < 2) return;
  s.stride = 1, s.upsample = 2, s.kh = s.kw = 2 * taps - 1;
  if (!strcmp(s.mode, "reflect")) s.pad(1);
}

Setting setting_for(const Algorithm& algorithm, Random& random) {
  for (;;) {
    Setting s = random_setting(random, random.between(0, 2) ? Op::fused : Op::gated);
    if (algorithm.taps) {
      s.beside = 0, halve(s, algorithm.taps, random);
      if (s.possible()) return s;
      continue;
    }
    if (algorithm.run != conv::direct) s.transposed = false, s.output_padding = 0;
    if (algorithm.run != conv::direct && algorithm.run != conv::columns) s.stride = 1;
    if (algorithm.kernel) s.kh = s.kw = algorithm.kernel;
    if (algorithm.rows) s.kh = random.between(1, 7), s.dilation = 1;
    if (algorithm.run == conv::pointwise) s.pad(0);
    if (!algorithm.adds_beside() || !s.takes_beside()) s.beside = 0;
    if (algorithm.run == conv::planar) s.outputs = random.between(1, conv::kFewFilters / (s.op == Op::gated ? 2 : 1));
    if (s.possible()) return s;
  }
}

void every_algorithm_on_what_it_covers() {
  Random random{1};
  for (const Algorithm& algorithm : kAlgorithms) {
    largest = 0.0;
    for (int round = 0; round < 40; ++round) {
      check_algorithm(algorithm, random, setting_for(algorithm, random), static_cast<int>(random.between(1, 3)));
    }
    check::note("%s: float32 at most %.2f of %.2f units", algorithm.name, largest, algorithm.units);
  }
}

// Every height and width around the tiles', and dilations that leave some residues fewer tiles, or none.
void every_number_of_tiles() {
  Random random{2};
  for (const Algorithm& algorithm : kAlgorithms) {
    if (!algorithm.spreads) continue;
    for (int64_t size = 1; size <= 14; ++size) {
      Setting s;
      s.kh = s.kw = algorithm.kernel, s.inputs = 3, s.outputs = 2;
      s.h = size, s.w = 15 - size;
      if (!algorithm.taps) {
        s.dilation = algorithm.rows ? 1 : 1 + size % 3, s.pad(s.dilation * (s.kh / 2));
        check_algorithm(algorithm, random, s);
        continue;
      }
      for (s.stride = 2; s.kh <= 2 * algorithm.taps; ++s.kh, ++s.kw) {
        for (int64_t side = 0; side < 4; ++side) {  // more on one side than on the other, too
          s.pads[0] = s.pads[1] = side, s.pads[2] = s.pads[3] = (side + size) % 3;
          s.transposed = false;
          if (s.possible()) check_algorithm(algorithm, random, s);
          s.transposed = true, s.output_padding = side % 2;
          if (s.possible()) check_algorithm(algorithm, random, s);
          s.output_padding = 0;
        }
      }
      s.stride = 1, s.upsample = 2, s.transposed = false, s.kh = s.kw = algorithm.kernel;
      for (int64_t side = 0; side < 4; ++side) {
        s.pads[0] = s.pads[1] = side, s.pads[2] = s.pads[3] = (side + size) % 3;
        if (s.possible()) check_algorithm(algorithm, random, s);
      }
    }
  }
}

// Sums of more channels than a chain has, whose rounding errors must not grow with their number.
void long_sums() {
  Random random{3};
  for (const Algorithm& algorithm : kAlgorithms) {
    largest = 0.0;
    for (int64_t inputs : {65, 130, 256}) {
      Setting s;
      s.kh = s.kw = algorithm.kernel ? algorithm.kernel : 2, s.inputs = inputs, s.outputs = 3, s.h = 8, s.w = 9;
      s.stride = algorithm.taps ? 2 : 1;
      check_algorithm(algorithm, random, s);
    }
    check::note("%s: float32 at most %.2f of %.2f units", algorithm.name, largest, algorithm.units);
  }
}

// Few pixels and many filters: panels of one vector of pixels and of several, one chunk of channels and several, also
// ragged ones, and weights that lie as [channel][tap] and as [tap][channel]; filters for one thread and for three.
void columns_of_few_pixels() {
  Random random{4};
  const Algorithm* algorithm = kAlgorithms;
  while (algorithm->run != conv::columns) ++algorithm;
  largest = 0.0;
  for (int dtype : {IRT_F32, IRT_BF16}) {
    for (Op op : {Op::fused, Op::gated}) {
      for (int64_t side : {1, 2, 5, 11}) {
        Setting s;
        s.op = op, s.dtype = dtype, s.b = 2, s.inputs = 83, s.outputs = 3 * W + 1, s.h = side, s.w = side + 1;
        s.kh = s.kw = 3, s.pad(1), s.bias = true;
        for (int threads : {1, 3}) check_algorithm(*algorithm, random, s, threads);
        s.stride = 2, s.parameters = Memory::nhwc;
        check_algorithm(*algorithm, random, s, 2);
        s.kh = s.kw = 1, s.parameters = Memory::random;
        check_algorithm(*algorithm, random, s);
      }
    }
  }
  check::note("%s: float32 at most %.2f of %.2f units", algorithm->name, largest, algorithm->units);
}

// Both orders of Winograd's algorithm, on few tiles and on many: several panels of filters, rows of tiles of two images
// together, fewer panels than threads; of few tiles also several chunks of channels, ragged ones too.
void winograd_by_filters_and_by_tiles() {
  Random random{6};
  for (const Algorithm& algorithm : kAlgorithms) {
    if (!algorithm.spreads) continue;
    largest = 0.0;
    for (int dtype : {IRT_F32, IRT_BF16}) {
      for (Op op : {Op::fused, Op::gated}) {
        Setting s;
        s.op = op, s.dtype = dtype, s.b = 2, s.inputs = 67, s.outputs = kPanelColumns + 1, s.h = 6, s.w = 5;
        s.kh = s.kw = algorithm.kernel, s.pad(1), s.bias = true, s.stride = algorithm.taps ? 2 : 1;
        if (algorithm.adds_beside() && op == Op::fused) s.beside = 2 * W + 3, s.residual = Residual::after;
        for (int threads : {1, 2, 16}) check_algorithm(algorithm, random, s, threads);
        s.inputs = 5, s.pad(algorithm.kernel / 2), s.h = 1, s.w = 4 * (conv::kTilesPerGroup + 2) * s.stride;
        check_algorithm(algorithm, random, s, 3);
      }
    }
    check::note("%s: float32 at most %.2f of %.2f units", algorithm.name, largest, algorithm.units);
  }
}

// Filters that lie far, for more tiles than a group has. A dilation makes a tile of every pixel.
void winograd_by_filters_in_groups() {
  Random random{7};
  Setting s;
  s.inputs = s.outputs = 352, s.h = 2, s.w = conv::kTilesPerGroup / 2 + 1, s.kh = s.kw = 3, s.dilation = s.w;
  s.pad(s.dilation);
  for (const Algorithm& algorithm : kAlgorithms) {
    if (algorithm.run == conv::winograd_f43) check_algorithm(algorithm, random, s, 3);
  }
}

// ---- the transforms: y = Aᵀ[(G g) ∘ (Bᵀ d)] is a convolution of one dimension --------------------------------------

constexpr double kTransformUnits = 15.0;  // of ‖g‖₁ · max|d|: what was measured, with half as much again

double number(Random& random) { return static_cast<double>(random.between(-0xffffff, 0xffffff)) * 0x1p-24; }

template <class Form>
void check_transforms(const char* name, Random& random, bool whole) {
  constexpr int m = Form::kOutputs, r = Form::kTaps, n = Form::kInputs;
  double worst = 0.0;
  for (int round = 0; round < 200; ++round) {
    double d[n], g[r], norm = 0.0, most_d = 0.0;
    Vec inputs[n], taps[r], transformed[n], filters[n], outputs[m];
    for (int i = 0; i < n; ++i) {
      d[i] = whole ? static_cast<double>(random.between(-999, 999)) : number(random);
      inputs[i] = Vec(static_cast<float>(d[i])), most_d = std::max(most_d, std::fabs(d[i]));
    }
    for (int i = 0; i < r; ++i) {
      g[i] = whole ? static_cast<double>(2 * random.between(-499, 499)) : number(random);
      taps[i] = Vec(static_cast<float>(g[i])), norm += std::fabs(g[i]);
    }
    Form::input(inputs, transformed), Form::filter(taps, filters);
    for (int i = 0; i < n; ++i) transformed[i] = transformed[i] * filters[i];
    Form::output(transformed, outputs);
    for (int i = 0; i < m; ++i) {
      float lanes[W];
      store(lanes, outputs[i]);
      double want = 0.0;
      for (int k = 0; k < r; ++k) want += g[k] * d[i + k];
      for (float lane : lanes) {
        const double error = std::fabs(lane - want), units = error / (0x1p-24 * norm * most_d + 0x1p-149);
        CHECK(units <= kTransformUnits && (!whole || error == 0.0), "%s: output %d is %.9g, not %.9g", name, i,
              static_cast<double>(lane), want);
        worst = std::max(worst, units);
      }
    }
  }
  check::note("%s: at most %.2f of %.2f units", name, worst, kTransformUnits);
}

void transforms_are_convolutions() {
  Random random{5};
  check_transforms<winograd::F23>("F(2, 3)", random, false);
  check_transforms<winograd::F42>("F(4, 2)", random, false);
  check_transforms<winograd::F43>("F(4, 3)", random, false);
  check_transforms<winograd::F25>("F(2, 5)", random, false);
  check_transforms<winograd::F45>("F(4, 5)", random, false);
  check_transforms<winograd::F27>("F(2, 7)", random, false);
  check_transforms<winograd::F23>("F(2, 3) of whole numbers", random, true);  // has no other factor than 1/2: exact
}

}  // namespace
}  // namespace irt::INPAINTRT_ISA

using namespace irt::INPAINTRT_ISA;

const check::Case check::cases[] = {
    {"transforms are convolutions", transforms_are_convolutions},
    {"every algorithm on what it covers", every_algorithm_on_what_it_covers},
    {"every number of tiles", every_number_of_tiles},
    {"long sums", long_sums},
    {"columns of few pixels", columns_of_few_pixels},
    {"winograd by filters and by tiles", winograd_by_filters_and_by_tiles},
    {"winograd by filters in groups", winograd_by_filters_in_groups},
    {nullptr, nullptr},
};
