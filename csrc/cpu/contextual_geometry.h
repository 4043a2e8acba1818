// contextual_attention: how the work is cut, and what lies where in the workspace.
//
// All threads work on one strip of columns of cells at a time, from the top row to the bottom one; they share the keys.
// What a row of cells hands to the next ones are lines of L floats, one per column of the strip and quantity:
//
//   A    5 rows   Gram matrix, summed over horizontal shifts
//   S    3 rows   patch scores, summed over shifts in row-major order; and row 0, which the last row needs again
//   P    2 rows   normalised weights
//
// Eleven lines a column. A strip has as many columns as keep everything below 12·128·L floats, whatever the threads.
#pragma once

#include "contextual_call.h"
#include "gemm.h"

namespace irt::INPAINTRT_ISA::contextual {

constexpr int64_t W = Vec::kWidth;
constexpr int64_t kSpan = 512;          // keys that a thread takes at a time
constexpr int64_t kGroups = kSpan / W;  // vectors of keys in a chunk of the pasting product
constexpr int64_t kBudget = 12 * 128;   // floats per cell
constexpr int64_t kFewestColumns = 16;  // of a strip, and then the budget may be exceeded: very many channels
constexpr int kSumRows = 5, kScoreRows = 3, kWeightRows = 2;
constexpr int kLines = kSumRows + kScoreRows + 1 + kWeightRows;
constexpr int64_t kHalo = 4;  // columns beside a strip: pasting 1, last row's wrap 1, score lines 1, Gram 1

struct Geometry {
  int64_t cells, channel_blocks, panels;      // L; vectors and panels of channels
  int64_t groups, group_pad;                  // vectors of keys, and those beyond either end of a line of flags
  int64_t margin, line, flags;                // floats before a line's first key; floats and bytes from line to line
  int64_t key_rows, key_blocks, key_columns;  // rows of keys in a block, blocks, columns of its product
  int64_t block_floats;                       // of packed keys
  int64_t columns, list;                      // of output in a strip; of the strip with all that they need
  int64_t pixels, out_row;                    // floats between blocks of channels, and of one finished row
  int64_t query_stride, gram_row,
      probe_row;            // scratch: floats between groups of queries, rows of a product, score lines
  int64_t probes, scratch;  // all score lines, and as much behind them for what they lack
  int threads;

  explicit Geometry(const Call& c) : threads(static_cast<int>(least(c.threads, 1024))) {
    cells = c.cells();
    channel_blocks = ceil_div(c.channels, W), panels = ceil_div(channel_blocks, kPanelVectors);
    groups = ceil_div(cells, W), group_pad = c.width / W + 3;
    margin = vectors(c.width + W + 1), line = margin + vectors(cells) + margin, flags = groups + 2 * group_pad;
    key_blocks = least(c.height, ceil_div(ceil_div(cells, kSpan), threads) * threads);
    key_rows = ceil_div(c.height, key_blocks), key_blocks = ceil_div(c.height, key_rows);
    key_columns = ceil_div(key_rows * c.width, kPanelColumns) * kPanelColumns;
    block_floats = key_columns * c.channels;
    const int64_t most_columns = (kBudget * cells - fixed_floats()) / (kLines * line);
    columns = c.width;
    list = c.width;
    if (c.width > most_columns) {
      const int64_t strips = ceil_div(c.width, most(kFewestColumns, most_columns - 2 * kHalo));
      columns = ceil_div(c.width, strips);
      list = least(c.width, columns + 2 * kHalo);
    }
    pixels = 2 * columns * W, out_row = panels * kPanelVectors * pixels;
    query_stride = list * W | W;
    gram_row = key_columns + 2 * W, probe_row = kSpan + 2 * W, probes = (list + 2) * probe_row;
    const int64_t gram = channel_blocks * query_stride + list * gram_row, probe = 2 * probes;
    scratch = vectors(most(most(gram, probe), kGroups * kTileRows * W));
  }

  int64_t key_floats() const { return vectors(key_blocks * block_floats); }
  int64_t phase_floats() const { return panels * groups * W * kPanelColumns; }  // of one phase of values
  int64_t index_floats() const { return 4 * line; }                             // norms, which keys count, columns
  int64_t fixed_floats() const { return key_floats() + 4 * phase_floats() + index_floats() + 2 * line; }
  int64_t lines() const { return kLines * list + 1; }  // and one of zeros
  int64_t flag_bytes() const { return (kWeightRows * list + 1) * flags; }
  int64_t floats() const {
    return fixed_floats() + lines() * line + vectors(flag_bytes() / 4 + 1) + 2 * out_row + threads * scratch;
  }
};

}  // namespace irt::INPAINTRT_ISA::contextual
