// The pieces of group_linear that run in parallel, compiled once an instruction set, and the layout that they
// share. What decides a sum (kDepth, kColumns, chunks) depends on the shape alone, never on the instruction set or
// the number of threads; how rows and columns are shared out among tasks may depend on both.
//
//   block    [depths][block_rows + spare][kStride]    rows of x or dlogits, widened, in runs of kDepth words
//   tile     [block_rows + spare][kStride]            their products with kColumns outputs, then h
//   weight   [output panels][words][16]               zeros beyond the last output
//   critic   [class panels][outputs][16]; backward: [output panels][classes][16]
//   partial  [column blocks][rows][class lanes]       each column block's share of the logits
//
// A word of x and weight is one input as a float. With `pairs` (bf16 x, where the processor has dot products of it) it
// is two inputs in bf16, and a row has half as many.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/group_linear.h"

namespace lct {

constexpr int64_t kPanel = 16;
// Words that are summed in registers before they are added to what stands in memory.
constexpr int64_t kDepth = 256;
// Outputs of one tile.
constexpr int64_t kColumns = 256;
// Floats from one row to the next: a power of two would put all rows in the same cache sets.
constexpr int64_t kStride = 256 + kPanel;
// Rows that a register tile may overhang a block by.
constexpr int64_t kSpareRows = 4;

struct GroupLinearWork {
  GroupLinear args;
  int64_t output_panels, class_panels, column_blocks;
  bool pairs;
  int64_t words, depths;
  int64_t block_rows;
  // Column blocks that one task takes. Short of all of them, shares of the logits wait in `partial` for a second
  // pass; else each slot has a `partial` of its own, for the rows of its block.
  int64_t blocks_a_task;
  bool split;

  float* weight;
  float* bias;         // [output_panels][16]
  float* critic;
  float* critic_bias;  // [class_panels][16]
  float* partial;      // after a split
  float* scratch;      // block, tile and, unless split, partial of each slot
  int64_t scratch_size, block_size, tile_size;
};

struct GroupLinearBackwardWork {
  GroupLinearBackward args;
  int64_t output_panels, column_blocks, depths;
  int64_t chunks, chunk_rows, block_rows;

  float* critic;
  float* sums;     // [chunks][output_panels][16]
  float* scratch;  // block and tile of each slot
  int64_t scratch_size, block_size;
};

struct GroupLinearTasks {
  // Packs a panel of 16 outputs of weight, or of 16 classes of critic_weight, with their biases.
  void (*pack_weight)(const GroupLinearWork&, int64_t panel);
  void (*pack_critic)(const GroupLinearWork&, int64_t panel);
  // Rows [first, first + count), at most block_rows, and the column blocks of one task, from `column_block` on.
  void (*rows)(const GroupLinearWork&, int64_t first, int64_t count, int64_t column_block, int slot);
  // logits of rows [first, first + count) after a split.
  void (*logits)(const GroupLinearWork&, int64_t first, int64_t count);
  // Packs a panel of 16 outputs of critic_weight.
  void (*pack_backward)(const GroupLinearBackwardWork&, int64_t panel);
  // dpre and its sums over rows, of one chunk and one column block.
  void (*chunk)(const GroupLinearBackwardWork&, int64_t chunk, int64_t column_block, int slot);
  // Folds the chunks' sums in order.
  void (*fold)(const GroupLinearBackwardWork&);
};

namespace scalar {
extern const GroupLinearTasks group_linear_tasks;
}
namespace avx2 {
extern const GroupLinearTasks group_linear_tasks;
}
namespace avx512 {
extern const GroupLinearTasks group_linear_tasks;
}

}  // namespace lct
