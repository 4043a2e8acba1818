// Which algorithm a convolution takes: the cheapest by a model of their costs, unless it was told otherwise.
#include "conv_algorithms.h"
#include "gemm.h"
#include "preferences.h"
#include "winograd.h"

namespace irt::INPAINTRT_ISA::conv {
namespace {

bool pads(const Call& call) { return call.top || call.left || call.bottom || call.right; }
bool unstrided(const Call& call) { return call.stride == 1 && !call.transposed; }
// Beyond, there are hardly any tiles to a subsampled grid, and strips of rows that far apart.
bool near(const Call& call) { return call.dilation <= 64; }
bool square(const Call& call, int64_t side) { return call.kernel_height() == side && call.kernel_width() == side; }
bool single(const Call& call) { return call.x->dtype == IRT_F32; }
// Filters that a modulated convolution turns over by their strides.
bool mirrored(const Call& call) { return call.weight->strides[2] < 0 || call.weight->strides[3] < 0; }
// Whether what all outputs read may exist at once: 8 MB of it.
bool few_pixels(const Call& call) {
  const int64_t weights = most(1, call.inputs() * call.kernel_height() * call.kernel_width());
  return ceil_div(call.batch() * call.height() * call.width(), W) * W <= (int64_t{1} << 21) / weights;
}

// Time in multiply-adds of one vector at the rate of the direct form's products: 6.2 a nanosecond on one core of a
// Zen 5 (AVX-512), where the constants come from; what comes beside the products is memory traffic more than
// arithmetic, and so counts alike on all ISAs. Fitted by hand to one thread's times, so that the order of the
// algorithms is right: 3×3 and 5×5 layers of 32 to 512 channels on maps of 2×2 (there it is packing and the filters'
// transforms that one sees) to 256×256.

// Transforming filters: so many values each, which cost up to three times as much where all of them together do not
// stay near the core. `each`: of a vector. By filters they stay, are made for each group of tiles, and the products
// have to fetch what other tiles would share. `tiles`: of an image.
double transformed_filters_cost(const Call& call, int64_t tiles, int64_t values, double each) {
  constexpr double kNear = 1 << 21, kFetched = 3;  // floats
  const double vectors = static_cast<double>(values * call.inputs() * Filters(call).blocks);
  if (goes_by_filters(call, tiles, values)) {
    return (each + kFetched) * vectors * static_cast<double>(ceil_div(call.batch() * tiles, kTilesPerGroup));
  }
  const double far = vectors * static_cast<double>(W) / kNear - 1;
  return each * vectors * (1 + (far < 0 ? 0 : far < 2 ? far : 2));
}
constexpr double kFilter = 13, kFilterByPhases = 20;  // of a vector; by phases taps are sorted, too

template <class Form>
double winograd_cost(const Call& call) {
  constexpr int64_t kValues = Form::kInputs * Form::kInputs;
  const int64_t tiles = tiles_along(call.height(), call.dilation, Form::kOutputs) *
                        tiles_along(call.width(), call.dilation, Form::kOutputs);
  const double all = static_cast<double>(kValues * call.batch() * tiles);
  const double blocks = static_cast<double>(Filters(call).blocks);
  const double inputs = static_cast<double>(call.inputs()), in_blocks = static_cast<double>(ceil_div(call.inputs(), W));
  constexpr double kTile = Form::kOutputs > 2 ? 20 : 12;
  return all * inputs * blocks + transformed_filters_cost(call, tiles, kValues, kFilter) +
         kTile * all * (in_blocks + blocks);
}

// Along rows: as many sums of products as the direct form has, over Form::kInputs / Form::kOutputs times fewer taps.
template <class Form>
double rows_cost(const Call& call) {
  constexpr double kPoints = static_cast<double>(Form::kInputs) / Form::kOutputs, kTile = 6;
  const double pixels = static_cast<double>(call.batch()) * static_cast<double>(call.height() * call.width());
  const double blocks = static_cast<double>(ceil_div(Filters(call).blocks, 2) * 2);
  const double inputs = static_cast<double>(call.inputs()), in_blocks = static_cast<double>(ceil_div(call.inputs(), W));
  const double filters = static_cast<double>(call.kernel_height() * Form::kTaps) * inputs * blocks;
  return pixels * kPoints *
             (static_cast<double>(call.kernel_height()) * inputs * blocks + kTile * (in_blocks + blocks)) +
         40 * filters + 12 * pixels * blocks;
}

template <class Form>
bool along_rows(const Call& c) {
  return unstrided(c) && c.dilation == 1 && c.kernel_width() == Form::kTaps && !c.ieee;
}

template <class Form>
bool by_phases(const Call& call) {
  if (call.ieee || !Tiling::halves(call)) return false;
  return Tiling(call, 0, true).fits(Form::kTaps) && Tiling(call, 1, true).fits(Form::kTaps);
}

template <class Form>
double phases_cost(const Call& call) {
  constexpr int64_t m = Form::kOutputs, n = Form::kInputs;
  const Tiling y(call, 0, true), x(call, 1, true);
  const auto both = [&](auto of) { return of(y) * of(x); };
  const int64_t all_points = both([](const Tiling& t) { return t.points(0, n) + t.points(t.phases() - 1, n); });
  const int64_t values = both([](const Tiling& t) { return t.values(0, n) + t.values(t.phases() - 1, n); });
  const int64_t image_tiles = both([](const Tiling& t) { return ceil_div(t.size, m); });
  const double points = static_cast<double>(all_points), tiles = static_cast<double>(call.batch() * image_tiles);
  const double in = y.inputs > 1 ? points : n * n, out = y.inputs > 1 ? n * n : points;
  const double inputs = static_cast<double>(call.inputs()), in_blocks = static_cast<double>(ceil_div(call.inputs(), W));
  const double blocks = static_cast<double>(Filters(call).blocks);
  return points * tiles * inputs * blocks + transformed_filters_cost(call, image_tiles, values, kFilterByPhases) +
         12 * tiles * (in * in_blocks + out * blocks);
}

double planar_cost(const Call& call) {
  const double pixels = static_cast<double>(call.batch()) * static_cast<double>(call.height() * call.width());
  const double taps = static_cast<double>(call.kernel_height() * call.kernel_width());
  const double filters = static_cast<double>(call.outputs() * (call.gated ? 2 : 1));
  const double inputs = static_cast<double>(call.inputs()), in_blocks = static_cast<double>(ceil_div(call.inputs(), W));
  return pixels * (1.2 * taps * inputs * filters / static_cast<double>(W) + 8 * in_blocks + 24);
}

// Of a multiply-add's time for each of two channels that are multiplied at once: between a Zen 4's, 0.5, and a Zen 5's,
// 0.65. It decides between the direct form and Winograd's by phases, which by this model a Zen 5 finds alike.
constexpr double kPair = 0.55;

// `packed`: of a vector of filters.
double cost_of_direct(const Call& call, double packed) {
  const double blocks = static_cast<double>(ceil_div(Filters(call).blocks, 2) * 2);
  const double pixels = static_cast<double>(call.batch()) * static_cast<double>(call.height() * call.width());
  const double inputs = static_cast<double>(call.inputs());
  double taps = static_cast<double>(call.kernel_height() * call.kernel_width());
  if (call.transposed) taps /= static_cast<double>(call.stride * call.stride);
  if (phased(call)) {
    taps = static_cast<double>((call.kernel_height() / 2 + 1) * (call.kernel_width() / 2 + 1));
    packed *= static_cast<double>(call.upsample * call.upsample);
  }
  const bool pairs = !single(call) && LaneOf<bf16>::kChannels == 2;
  return (pairs ? kPair : 1) * pixels * taps * inputs * blocks + packed * taps * inputs * blocks + 12 * pixels * blocks;
}

double direct_cost(const Call& call) { return cost_of_direct(call, 40); }
double pointwise_cost(const Call& call) { return cost_of_direct(call, 16); }

double cost_of_columns(const Call& call, int64_t pixels) {
  const double weights = static_cast<double>(call.kernel_height() * call.kernel_width() * call.inputs());
  const double filters = static_cast<double>(call.outputs() * (call.gated ? 2 : 1));
  const int64_t vectors = ceil_div(pixels, W), width = vectors > 1 ? kPanelVectors : 1;
  const double columns = static_cast<double>(ceil_div(vectors, width) * width);
  const bool pairs = !single(call) && LaneOf<bf16>::kChannels == 2;
  return (pairs ? kPair : 1) * weights * filters * (0.85 * columns + 0.8) + 40 * weights * columns +
         35 * filters * columns + 16e3;
}

double columns_cost(const Call& call) { return cost_of_columns(call, call.batch() * call.height() * call.width()); }

struct Algorithm {
  const char* name;
  Runner run;
  bool (*takes)(const Call&);  // whether it computes this call, but for what is beside it
  double (*cost)(const Call&);
  bool beside = false;  // whether it adds a 1×1 convolution (Call::beside)

  bool covers(const Call& call) const { return takes(call) && (beside || !call.beside); }
};

// In order of preference at equal cost. Names are known to users' files of preferences.
constexpr Algorithm kAlgorithms[] = {
    {"pointwise", pointwise, [](const Call& c) { return square(c, 1) && unstrided(c) && !pads(c); }, pointwise_cost},
    {"direct", direct, [](const Call&) { return true; }, direct_cost},
    {"planar", planar,
     [](const Call& c) { return unstrided(c) && near(c) && c.outputs() * (c.gated ? 2 : 1) <= kFewFilters; },
     planar_cost},
    {"columns", columns, [](const Call& c) { return !c.transposed && near(c) && few_pixels(c) && !mirrored(c); },
     columns_cost},
    {"winograd F(4×4,3×3)", winograd_f43,
     [](const Call& c) { return unstrided(c) && near(c) && square(c, 3) && !c.ieee; }, winograd_cost<winograd::F43>,
     true},
    {"winograd F(2×2,3×3)", winograd_f23, [](const Call& c) { return unstrided(c) && near(c) && square(c, 3); },
     winograd_cost<winograd::F23>, true},
    {"winograd F(2×2,5×5)", winograd_f25,
     [](const Call& c) { return unstrided(c) && near(c) && square(c, 5) && !c.ieee; }, winograd_cost<winograd::F25>,
     true},
    {"winograd F(4,5) along rows", rows_f45, along_rows<winograd::F45>, rows_cost<winograd::F45>},
    {"winograd F(2,7) along rows", rows_f27, along_rows<winograd::F27>, rows_cost<winograd::F27>},
    {"winograd F(4×4,2×2) by phases", winograd_f42_phases, by_phases<winograd::F42>, phases_cost<winograd::F42>},
    {"winograd F(4×4,3×3) by phases", winograd_f43_phases, by_phases<winograd::F43>, phases_cost<winograd::F43>},
};
static_assert(sizeof kAlgorithms <= IRT_MAX_ALGORITHMS * sizeof(Algorithm), "irt_choice has no room for them");

// What the algorithms' times depend on, of a call on this instruction set; and all that `covers` asks.
template <size_t kBytes>
void write_key(const Call& c, char (&key)[kBytes]) {
  const auto at = [](int64_t number) { return static_cast<long long>(number); };
  snprintf(
      key, kBytes,
      "convolution %s %lld>%lld %lldx%lld%s%s%s stride %lld dilation %lld up %lld%s%s pad %d to %lldx%lldx%lld threads "
      "%d%s " IRT_STRING(INPAINTRT_ISA),
      single(c) ? "float32" : "bfloat16", at(c.inputs()), at(c.outputs()), at(c.kernel_height()), at(c.kernel_width()),
      c.beside ? " beside 1x1" : "", c.gated ? " gated" : "", c.transposed ? " transposed" : "", at(c.stride),
      at(c.dilation), at(c.upsample), c.upsample > 1 && !doubled_by_phases(c) ? " whole" : "",
      c.style && c.style->filter ? " filtered" : "", pads(c), at(c.batch()), at(c.height()), at(c.width()), c.threads,
      c.ieee ? " ieee" : "");
}

const Algorithm& cheapest(const Call& call) {
  const Algorithm* best = nullptr;
  double least_cost = 0;
  for (const Algorithm& algorithm : kAlgorithms) {
    if (!algorithm.covers(call)) continue;
    const double cost = algorithm.cost(call);
    if (!best || cost < least_cost) best = &algorithm, least_cost = cost;
  }
  return *best;  // there is one: the direct form takes any call, and what is beside one is none of others
}

// `refused` is set where somebody prefers what is no algorithm for this call.
const Algorithm& chosen(const Call& call, const char* key, bool& refused) {
  char name[::irt::kLongestAlgorithm + 1];
  refused = false;
  if (!::irt::preferred(key, name)) return cheapest(call);
  for (const Algorithm& algorithm : kAlgorithms) {
    if (!strcmp(algorithm.name, name) && algorithm.covers(call)) return algorithm;
  }
  refused = true;
  return cheapest(call);
}

const Algorithm& chosen(const Call& call) {
  if (!::irt::any_preferences()) return cheapest(call);
  char key[sizeof irt_choice::key];
  bool refused;
  write_key(call, key);
  return chosen(call, key, refused);
}

}  // namespace

void run(const Call& call, irt_status& status) {
  if (call.out->sizes[0] == 0) return;
  if (!fits(call)) return fail(status, IRT_OUT_OF_MEMORY, "no memory for a workspace of that size");
  chosen(call).run(call, status);
}

Plan planned(const Call& call) {
  const Algorithm& best = chosen(call);
  Call ieee = call;
  ieee.ieee = true;
  return {best.run, best.cost(call), best.covers(ieee)};
}

double cost_of_windows(const Call& call, int64_t count) {
  const int64_t at_once = windows_at_once(call);
  const double columns = static_cast<double>(count / at_once) * cost_of_columns(call, at_once) +
                         (count % at_once ? cost_of_columns(call, count % at_once) : 0);
  const double values = static_cast<double>(call.inputs() * call.kernel_height() * call.kernel_width() * count);
  return columns + (call.x->strides[1] == 1 ? 9 : 20) * values;  // they lie anywhere in memory
}

void choose(const Call& call, irt_choice& choice) {
  if (call.out->sizes[0] == 0 || !fits(call) || (!single(call) && call.x->dtype != IRT_BF16)) return;
  write_key(call, choice.key);
  bool refused;
  const Algorithm& best = chosen(call, choice.key, refused);
  choice.refused = refused, choice.ieee = call.ieee;
  for (const Algorithm& algorithm : kAlgorithms) {
    if (&algorithm == &best) choice.chosen = choice.count;
    if (algorithm.covers(call)) choice.algorithms[choice.count++] = algorithm.name;
  }
}

}  // namespace irt::INPAINTRT_ISA::conv
