// Launch plan of contextual_attention: how the grid is cut into tiles, what lies where in the workspace.
#include "contextual_attention.h"

#include <algorithm>
#include <initializer_list>

#include "plan.h"

#include "contextual_call.h"  // after plan.h, which says whose namespace it is in

namespace irt::plan {
namespace {

using Params = ContextualAttention;
using contextual::Call;

constexpr int64_t kBudget = 12 * 128;             // floats of the workspace per key, tables not counted
constexpr int64_t kMostCells = int64_t{1} << 22;  // of a sample, so that a row of lines has fewer than 2^31 floats
constexpr int64_t kMostKeys = int64_t{1} << 30;   // of the call
constexpr int64_t kMostChannels = int64_t{1} << 18;
constexpr int kSmallestTile = 8;                                            // in cells; always fits
constexpr int kWidths[] = {kSmallestTile, 12, 16, 20, 24, 32, 40, 48, 64};  // of tiles, about; or the grid's
constexpr int kFewestKeys = 128;                                            // of a split of the pasting product
constexpr int kBlocksWanted = 512;  // of that product: some for each SM of a large GPU
constexpr double kStencil = 100.0;  // operations per score beside the products

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Params::Tensor tensor(const irt_view& view) {
  const bool inner = view.sizes[1] > 1 && view.strides[1] < view.strides[3];
  return {view.data, {view.strides[0], view.strides[1], view.strides[2], view.strides[3]}, inner};
}

Params::Mask mask(const irt_view* view) {
  if (!view) return {};
  const auto is = [view](std::initializer_list<int> dtypes) {
    for (int dtype : dtypes) {
      if (view->dtype == dtype) return true;
    }
    return false;
  };
  const int bytes = is({IRT_F64, IRT_I64}) ? 8 : is({IRT_F32, IRT_I32}) ? 4 : is({IRT_F16, IRT_BF16}) ? 2 : 1;
  const int64_t next_sample = view->sizes[0] == 1 ? 0 : view->strides[0];
  return {
      view->data, {next_sample, view->strides[2], view->strides[3]}, bytes, is({IRT_F64, IRT_F32, IRT_F16, IRT_BF16})};
}

// Sets how many lines the Gram matrix has at most, for tiles of the sizes in p, and what a slot takes with one split. A
// tile reaches four rows of cells and a column of tiles beyond its own, so the fifth row of tiles and the second column
// are like all others inside the grid. Returns the floats of a slot.
int64_t measure(Params& p) {
  const int down = p.tiles / p.tiles_across, rows = std::min(down, 10), columns = std::min(p.tiles_across, 3);
  p.gram_lines = 0;
  for (int i = 0; i < rows; ++i) {
    const int row = i < 5 ? i : down - rows + i;
    for (int j = 0; j < columns; ++j) {
      const int column = j < 2 ? j : p.tiles_across - 1;
      p.gram_lines = std::max(p.gram_lines, p.tile(row * p.tiles_across + column).gram_lines);
    }
  }
  p.gram_slot = std::max(int64_t{p.gram_lines} * p.pitch, 4 * up(p.split_floats(), 4));
  p.weight_slot = int64_t{p.weight_rows()} * p.weight_columns() * p.pitch;
  return p.gram_slot + p.weight_slot;
}

// Cuts a sample into tiles of about one size, `height` by `width` cells or somewhat less.
int64_t cut(Params& p, int64_t height, int width) {
  p.tile_height = static_cast<int>(up(p.height, up(p.height, height)));
  p.tile_width = static_cast<int>(up(p.width, up(p.width, width)));
  p.tiles_across = static_cast<int>(up(p.width, p.tile_width));
  p.tiles = static_cast<int>(up(p.height, p.tile_height)) * p.tiles_across;
  return measure(p);
}

// Cuts a sample into the tiles that need the fewest operations, of those of which a slot fits into so many floats.
void cut(Params& p, int64_t budget) {
  int height = 0, width = 0;
  double least = 0.0;
  const auto compare = [&](int wide) {
    if (cut(p, p.height, wide) > budget) {
      // Inside the grid a tile has three more cells on each side in the Gram matrix, and one among the weights.
      int64_t high = std::max((budget / p.pitch - 8 * wide - 40) / (2 * wide + 8), int64_t{0}) + 4;
      while (cut(p, high, wide) > budget) {
        if (--high == 0) return;
      }
    }
    const double products = p.channels * (2.0 * p.gram_lines + 8.0 * p.tile_cells());
    const double work = p.tiles * (products + kStencil * p.weight_rows() * p.weight_columns());
    if (height && work >= least) return;
    height = p.tile_height, width = p.tile_width, least = work;
  };
  compare(p.width);
  for (int wide : kWidths) {
    if (wide < p.width) compare(wide);
  }
  assert(height);  // the smallest tile always fits
  cut(p, height, width);
}

void fill(Params& p, const Call& c, const irt_call& call) {
  p.foreground = tensor(*c.foreground);
  p.background = tensor(*c.background);
  p.out = tensor(*c.out);
  p.mask = mask(c.mask);
  p.queries = mask(c.queries);
  p.batch = static_cast<int>(c.batch);
  p.channels = static_cast<int>(c.channels);
  p.height = static_cast<int>(c.height);
  p.width = static_cast<int>(c.width);
  p.cells = p.height * p.width;
  p.across = Divisor<int>::of(p.width);
  for (int axis = 0; axis < 2; ++axis) {
    const int count = axis == 0 ? p.height : p.width;
    const bool aligned = c.aligned && count > 1;
    p.last[axis] = 2 * count - 1;
    p.step[axis] = aligned ? static_cast<float>(2 * count - 1) / static_cast<float>(count - 1) : 2.0f;
  }
  p.stride = static_cast<int>(c.stride < p.cells ? c.stride : p.cells);
  p.propagate = c.propagate;
  p.virtual_key = !c.infinite;
  p.overlap = c.overlap;
  p.sum = c.sum;
  p.scale = c.scale;
  const double eps = float_arg(call.args[contextual::kEps], 1e-4);
  p.eps = static_cast<float>(c.sum ? 9.0 * static_cast<double>(c.channels) * eps : eps * eps);
}

// (foreground, background, mask, patch_size, stride, rate, fuse_size, softmax_scale, sampling, norm, eps, mask_mode,
// divisor, queries) -> out
void planned(const irt_call& call, irt_plan& plan, irt_status& status, int64_t per_key) {
  Call c{};
  if (const char* fault = contextual::read(call, false, c)) return fail(status, IRT_BAD_ARGUMENT, fault);
  if (!contextual::covered(call)) {
    return fail(status, IRT_UNSUPPORTED, "patch_size must be 3, rate 2 and fuse_size 0, 1 or 3");
  }
  const Storage type = storage(c.foreground->dtype);
  if (!type.per_vector) return fail(status, IRT_UNSUPPORTED, "dtype must be float32, bfloat16 or float16");
  if (c.batch == 0) return;  // no launches: nothing to do
  if (c.cells() > kMostCells) return fail(status, IRT_UNSUPPORTED, "h · w must be at most 2^24");
  if (c.channels > kMostChannels) return fail(status, IRT_UNSUPPORTED, "there must be at most 2^18 channels");
  if (c.batch > kMostKeys / c.cells()) {
    return fail(status, IRT_UNSUPPORTED, "the tensors have more elements than one launch can cover");
  }
  Params p{};
  fill(p, c, call);

  p.pitch = static_cast<int>(4 * up(p.cells, 4));
  // The second term matters where the output of a few queries takes more than their scores: tiny grids, many channels.
  const int64_t budget = per_key * p.cells + int64_t{kSmallestTile} * 2 * Params::kPhases * p.channels;
  cut(p, budget);
  p.units = p.batch * p.tiles;
  p.slots = static_cast<int>(std::min(budget / measure(p), int64_t{p.units}));

  // Wide blocks of channels need fewer loads of weights; narrow ones waste less where the number is no multiple.
  const int wide = 64, narrow = 32;
  const bool is_wide = wide * up(p.channels, wide) == narrow * up(p.channels, narrow);
  const int block_channels = is_wide ? wide : narrow;
  p.channel_blocks = static_cast<int>(up(p.channels, block_channels));
  const int64_t splits = std::min({kBlocksWanted / (int64_t{p.slots} * p.paste_rows() * p.channel_blocks),
                                   up(p.cells, kFewestKeys), int64_t{p.gram_slot / p.split_floats()}});
  p.split_keys = static_cast<int>(Params::kSlab * up(up(p.cells, std::max(splits, int64_t{1})), Params::kSlab));
  p.splits = static_cast<int>(up(p.cells, p.split_keys));

  const int64_t keys = int64_t{p.batch} * p.cells;
  p.inverses_at = keys;
  p.gram_at = 4 * ((2 * keys + 3) / 4);
  p.weights_at = p.gram_at + p.slots * p.gram_slot;
  p.states_at = static_cast<int64_t>(sizeof(float)) * (p.weights_at + p.slots * p.weight_slot);
  plan.workspace_bytes = p.states_at + keys;

  const int columns = 2 * p.tile_width, rows = 2 * p.tile_height;
  p.finish_sizes[0] = Divisor<int>::of(p.out.channels_inner ? p.channels : columns);
  p.finish_sizes[1] = Divisor<int>::of(p.out.channels_inner ? columns : rows);
  p.finish_blocks = static_cast<int>(up(int64_t{columns} * rows * p.channels, Params::kThreads));

  // A launch of `blocks` blocks; its name is `kernel`<`instance`>.
  const auto add = [&](const char* kernel, const char* instance, int64_t blocks, int threads, size_t shared) {
    if (status.code != IRT_OK) return;
    irt_launch* const launch = add_launch(plan, blocks * threads, threads, status);
    if (!launch) return;
    launch->shared_bytes = static_cast<uint32_t>(shared);
    snprintf(launch->entry, sizeof launch->entry, "irt::contextual_attention_%s<%s>", kernel, instance);
    set_params(*launch, p);
  };
  const int threads = Params::kThreads;
  add("squares", type.name, up(keys, threads), threads, 0);
  add("keys", p.sum ? "true" : "false", up(keys, threads), threads, 0);
  plan.first_repeated = plan.count;
  plan.rounds = static_cast<int>(up(p.units, p.slots));
  add("gram", type.name, int64_t{p.slots} * p.gram_rows() * p.gram_columns(), Params::kGramThreads,
      sizeof(Params::GramMemory));
  add("weights", p.propagate ? "true" : "false", int64_t{p.slots} * p.weight_rows() * p.weight_segments(),
      Params::kWeightThreads, sizeof(Params::WeightMemory));
  char paste[40];
  snprintf(paste, sizeof paste, "%s, %d", type.name, block_channels);
  add("paste", paste, int64_t{p.slots} * p.paste_rows() * p.channel_blocks * p.splits, threads,
      is_wide ? sizeof(Params::PasteMemory<64>) : sizeof(Params::PasteMemory<32>));
  add("finish", type.name, int64_t{p.slots} * p.finish_blocks, threads, 0);
}

void contextual_attention(const irt_call& call, irt_plan& plan, irt_status& status) {
  planned(call, plan, status, kBudget);
}

// The same with a sixth of the workspace: what tests cut small grids into many tiles with.
void contextual_attention_small(const irt_call& call, irt_plan& plan, irt_status& status) {
  planned(call, plan, status, kBudget / 6);
}

}  // namespace

IRT_PLAN(contextual_attention)
IRT_PLAN(contextual_attention_small)

}  // namespace irt::plan
