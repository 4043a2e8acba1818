// What the kernels of contextual_attention are given, and how the work is cut. Read by the planner (host C++) and the
// kernels (nvcc and NVRTC).
#pragma once

#include "nest.h"

namespace irt {

// A tile is a rectangle of queries of one sample. What it needs lies in lines of floats, one number per key: the Gram
// matrix of the cells around it, and the weights of the tile and of the cells next to it. A round computes as many
// tiles as the workspace has slots; the workspace has as many lines as a round needs, however many cells the grid has.
struct ContextualAttention {
  static constexpr int kThreads = 256, kGramThreads = 128, kWeightThreads = 512;
  static constexpr int kSlab = 8;        // of a product's inner dimension, in shared memory at a time
  static constexpr int kLines = 64;      // of a product that a block computes
  static constexpr int kGramKeys = 128;  // that a block of the Gram matrix covers
  static constexpr int kQueries = 4;     // neighbours in a row of cells whose weights a block computes
  static constexpr int kPhases = 4;      // of an image: even and odd rows and columns
  static constexpr unsigned char kOffered = 1, kUsable = 2, kWanted = 4;  // bits of a cell: two of the key, the query's

  struct Tensor {
    void* data;
    long long strides[4];  // of b, channel, y, x in elements
    bool channels_inner;   // neighbouring channels are neighbours in memory
  };
  struct Mask {
    const void* data;      // null where it is absent
    long long strides[3];  // of b, y, x in elements
    int bytes;             // of an element
    bool floating;
  };
  Tensor foreground, background, out;
  Mask mask, queries;

  int batch, channels;
  int height, width, cells;  // of the grid, half of the images'; cells = height · width: queries, and keys
  Divisor<int> across;       // = width
  float step[2];             // row (column) i of cells takes the pixels of row (column) ⌊i · step + ½⌋,
  int last[2];               // or of this one
  int stride;                // of the keys that the softmax sees
  bool propagate;            // scores to neighbouring cells
  bool virtual_key;          // masked keys have logit 0, not none
  bool overlap;              // divide by the number of patches on a pixel, not by 4
  bool sum;                  // the norm's eps term is added, not a lower bound
  float eps, scale;          // of squared norms; of scores

  int tile_height, tile_width, tiles_across, tiles;  // in cells; tiles of a row and of a sample
  int slots, units;                                  // tiles of a round and of the call
  int gram_lines;                                    // of the largest tile
  int pitch;                                         // floats of a line
  int channel_blocks, splits, split_keys;            // of the pasting product: a block's part of channels and keys
  int finish_blocks;                                 // of a slot
  Divisor<int> finish_sizes[2];                      // inner dimensions of a tile's output

  // In the workspace: by sample and cell the squared norm of the background's pixel, the inverse norm of its patch
  // (both in floats), its bits (in bytes); by slot the Gram matrix, later the output of each split, and the weights (in
  // floats).
  long long squares_at, inverses_at, states_at, gram_at, weights_at, gram_slot, weight_slot;

  IRT_BOTH int tile_cells() const { return tile_height * tile_width; }
  IRT_BOTH int gram_rows() const { return (gram_lines + kLines - 1) / kLines; }
  IRT_BOTH int gram_columns() const { return (cells + kGramKeys - 1) / kGramKeys; }
  IRT_BOTH int weight_rows() const { return lesser(tile_height + 2, height); }
  IRT_BOTH int weight_columns() const { return lesser(tile_width + 2, width); }
  IRT_BOTH int weight_segments() const { return (weight_columns() + kQueries - 1) / kQueries; }
  IRT_BOTH int paste_rows() const { return (tile_cells() + kLines - 1) / kLines; }
  IRT_BOTH long long split_floats() const { return static_cast<long long>(kPhases) * tile_cells() * channels; }

  // Lines of cells: that of (row, column), and so on by rows of `pitch` cells. Columns outside of the grid are those of
  // the next and the previous row, (r, c) is cell r · width + c: so do scores propagate from row to row.
  struct Block {
    int first, row, column, pitch, count;
    IRT_BOTH int line(int r, int c) const { return first + (r - row) * pitch + c - column; }
  };
  enum { kAround, kLastRows, kFirstRows };  // blocks of a tile

  struct Tile {
    int sample, top, left, bottom, right;                      // the queries
    int weight_top, weight_left, weight_bottom, weight_right;  // and their neighbours, whose weights are needed
    int gram_lines;
    Block blocks[3];  // some may be the same

    IRT_BOTH int weight_width() const { return weight_right - weight_left; }
    IRT_BOTH int weight_line(int r, int c) const { return (r - weight_top) * weight_width() + c - weight_left; }
    IRT_BOTH Block interval(int begin, int end, int width) {
      gram_lines += end - begin;
      return {gram_lines - (end - begin), 0, begin, width, end - begin};
    }
    IRT_BOTH Block rectangle(int from_row, int to_row, int from_column, int to_column) {
      const int pitch = to_column - from_column, count = (to_row - from_row) * pitch;
      gram_lines += count;
      return {gram_lines - count, from_row, from_column, pitch, count};
    }
  };

  // Scores that propagate in column-major order come, in the first row, from the last one and a column to the left; in
  // the last row from the first one and a column to the right.
  IRT_BOTH Tile tile(int unit) const {
    Tile t;
    t.sample = unit / tiles;
    const int index = unit - t.sample * tiles, down = index / tiles_across;
    t.top = down * tile_height;
    t.left = (index - down * tiles_across) * tile_width;
    t.bottom = lesser(t.top + tile_height, height);
    t.right = lesser(t.left + tile_width, width);
    t.weight_top = greater(t.top - 1, 0);
    t.weight_left = greater(t.left - 1, 0);
    t.weight_bottom = lesser(t.bottom + 1, height);
    t.weight_right = lesser(t.right + 1, width);

    t.gram_lines = 0;
    const int reach = propagate ? 2 : 1;  // of a patch, and of patches of neighbours
    const bool whole = t.weight_width() == width;
    if (whole) {  // rows of cells, which as an interval hold no cell twice
      t.blocks[kAround] = t.interval(greater((t.weight_top - reach) * width - reach, 0),
                                     lesser((t.weight_bottom + reach) * width + reach, cells), width);
    } else {
      t.blocks[kAround] = t.rectangle(greater(t.weight_top - reach, -1), lesser(t.weight_bottom + reach, height + 1),
                                      t.weight_left - reach, t.weight_right + reach);
    }
    t.blocks[kLastRows] = t.blocks[kFirstRows] = t.blocks[kAround];
    if (!propagate || (whole && t.gram_lines == cells)) return t;
    if (t.weight_top == 0) {
      t.blocks[kLastRows] = whole ? t.interval(greater((height - 2) * width - 3, 0), cells, width)
                                  : t.rectangle(height - 2, height + 1, t.weight_left - 3, t.weight_right + 1);
    }
    if (t.weight_bottom == height) {
      t.blocks[kFirstRows] = whole ? t.interval(0, lesser(2 * width + 3, cells), width)
                                   : t.rectangle(-1, 2, t.weight_left - 1, t.weight_right + 3);
    }
    return t;
  }

  // Shared memory of the kernels. Pitches keep float4 aligned and banks apart.
  struct GramMemory {
    float lines[2][kSlab][kLines + 4], keys[2][kSlab][kGramKeys + 4];
    long long line_at[kLines], key_at[kGramKeys];
    int wanted;
  };
  template <int kChannels>
  struct PasteMemory {
    float lines[2][kPhases][kSlab][kLines + 4], values[2][kPhases][kSlab][kChannels + 4];
    float* out;
    int first_line, first_channel, wanted;
  };
  // The queries of a block of weights and the keys, moved by a step of the column-major order. Bits from 0 stand for
  // the cells from one before the first query on where scores propagate, for the queries where they do not; in `held`
  // for those from one more to the left on.
  struct Move {
    int from, to, keys;    // of keys that `keys` is added to
    unsigned exists;       // the queries: not moved beyond the ends of the order; bit 0 is the first query
    unsigned live;         // cells of the grid
    unsigned left, right;  // with a cell beside them in their row
    int line[3];           // in the Gram matrix, of the first query: in the row above, its own, the row below
    unsigned held[3];      // cells that have a line there
  };
  struct WeightMemory {
    Tile tile;
    Move moves[5];
    float most[kQueries][kWeightThreads], sums[kQueries][kWeightThreads];
    int masked[kWeightThreads];
    int wanted;
  };

 private:
  IRT_BOTH static int lesser(int a, int b) { return a < b ? a : b; }
  IRT_BOTH static int greater(int a, int b) { return a > b ? a : b; }
};

}  // namespace irt
