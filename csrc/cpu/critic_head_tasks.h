// The pieces of critic_head that run in parallel, compiled once an instruction set, and the layout that they
// share. Sizes here depend on the shape alone, never on the instruction set or the number of threads.
//
// A block is up to block_rows rows of h, widened to float and cut into panels of 64 columns, so that it stays
// in cache while logits, softmax, dh and dweight are all computed from it:
//
//   block    [column_panels][block_rows + spare][64]   act(h), zeros right of depth
//   dlogits  [class_panels][block_rows + spare][16]    logits, then softmax - onehot, then row_scale times it
//   weight   twice: by class [class_panels][depth][16] for the logits, by column [column_panels][classes][64]
//            for dh; zeros beside the edges
//   sums     [column_panels][classes][64], then bias [class_panels][16]
//
// Weight gradients are summed in one of two ways, chosen by the shape:
//
//   chunks   where dweight is small: rows are cut into `chunks` equal runs, each with sums of its own, and
//            these are folded in order at the end. h is read once.
//   slab     where dweight is large or rows are few: row_scale * dlogits of slab_rows rows is kept, then each
//            panel of columns adds those rows to the only sums there are. h is read again.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/critic_head.h"

namespace lct {

constexpr int64_t kClassPanel = 16;
constexpr int64_t kColumnPanel = 64;
// Rows that a register tile may overhang a block by.
constexpr int64_t kSpareRows = 8;
// Class panels that one task of the slab way takes.
constexpr int64_t kClassGroup = 8;

struct CriticHeadWork {
  CriticHead args;
  // For the weight gradient alone; args.weight is then null.
  const void* given_dlogits;

  int64_t class_panels, column_panels;
  int64_t block_rows;
  int64_t block_stride;    // floats from one column panel of a block to the next
  int64_t dlogits_stride;  // floats from one class panel of dlogits to the next
  bool use_chunks, use_slab, stream_dh;
  int64_t chunks, chunk_rows;
  int64_t slab_rows;

  float* weight_by_class;
  float* weight_by_column;
  float* bias;          // [class_panels][16]
  float* scratch;       // a block and its dlogits for each slot
  int64_t scratch_size;
  float* sums;
  int64_t sums_size;    // of one chunk
  float* slab;          // [class_panels][slab_rows][16]
};

struct CriticHeadTasks {
  // Fills weight_by_class and weight_by_column for one panel of columns; panel 0 also the bias.
  void (*pack_weight)(const CriticHeadWork&, int64_t column_panel);
  // Rows [first, first + count): everything but weight gradients, and for the slab way the rows of the slab
  // that starts at row slab_start.
  void (*rows)(const CriticHeadWork&, int64_t first, int64_t count, int64_t slab_start, int slot);
  // The rows of one chunk, with its sums.
  void (*chunk)(const CriticHeadWork&, int64_t chunk, int slot);
  // Adds `count` rows of the slab that starts at row `first` to one panel of columns and one group of classes.
  void (*slab)(const CriticHeadWork&, int64_t first, int64_t count, int64_t column_panel, int64_t class_group,
               int slot);
  // Folds the sums of one panel of columns in order and writes dweight; panel 0 also dbias.
  void (*fold)(const CriticHeadWork&, int64_t column_panel);
};

namespace scalar {
extern const CriticHeadTasks critic_head_tasks;
}
namespace avx2 {
extern const CriticHeadTasks critic_head_tasks;
}
namespace avx512 {
extern const CriticHeadTasks critic_head_tasks;
}

}  // namespace lct
