// The pieces of vq that run in parallel, compiled once an instruction set, and the layout that they share.
// Sizes here depend on the shape alone, never on the instruction set or the number of threads.
//
// Rows are taken in blocks of 64, with a row in every lane, so that a word is a broadcast, the running minimum
// needs no reduction across lanes, and ties go to the lowest index by themselves:
//
//   columns      [depth][64]                             one group's vectors of a block, transposed
//   panels       [groups][tiles][depth][8]               the codebook, six words side by side, then two zeros
//   half_norms   [groups][tiles][8]                      |c|^2 / 2; +inf beside the last word
//   words        [groups][codewords][width]              the codebook with rows of whole fours of floats
//
// A run of 512 rows is the unit of work: it has sums of its own in one `VqPlace`, and places are folded into
// the chunk's sums and those into the total in the order of rows. Few places serve any number of rows.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/vq.h"

namespace lct {

constexpr int64_t kVqChunk = 4096;
constexpr int64_t kVqRun = 512;
constexpr int64_t kVqBlock = 64;
// Words whose scores stay in registers together, and the floats that they take up: one load.
constexpr int64_t kVqTile = 6;
constexpr int64_t kVqPitch = 8;

struct VqFilter;

// What one run of rows adds up to.
struct VqPlace {
  float* sums;            // [copies][groups][codewords][width], zeros before and after use
  int32_t* counts;        // [groups][codewords], likewise
  float* slot_scores;     // [groups][slots]
  int64_t* slot_rows;     // [groups][slots]
  float squared_error;
  bool flag;
};

struct VqWork {
  VqEncode args;
  int64_t bits;
  int64_t width;  // depth, rounded up to fours
  int64_t tiles;  // of a group
  // Of a run's sums: short rows on one word would wait for each other's sum to reach memory, so they take turns.
  int64_t copies;
  float* padded_words;  // null where width is depth
  const float* words;
  float* panels;
  float* half_norms;
  char* scratch;  // of all slots of parallel_for
  int64_t scratch_bytes;
  // vq_filter.h; null where it is not used.
  const VqFilter* filter;
  char* filter_words;  // of all groups
  int64_t filter_group_bytes;
  char* filter_scratch;  // of all slots
  int64_t filter_scratch_bytes;
  // Folded so far. The chunk's part is zero between chunks.
  float* chunk_sums;  // [groups][codewords][width]
  float chunk_error;
  float* total_sums;   // [groups][codewords][width]
  float total_error;
  int64_t* slot_rows;  // [groups][slots], with args.candidate_scores
  VqPlace* places;
  bool* ready;
  int64_t places_count;
};

struct VqDecodeWork {
  VqDecode args;
  int64_t bits;
  const void* words;  // [groups][codewords][depth] in args.dtype
};

struct VqTasks {
  // Bytes of scratch that a slot of parallel_for needs.
  int64_t (*scratch_bytes)(const VqWork&);
  // Readies the scratch of a slot for the first run.
  void (*begin)(const VqWork&, int slot);
  // Panels, half norms and padded words of words [first, first + count) of a group; first is a multiple of six.
  void (*pack)(const VqWork&, int64_t group, int64_t first, int64_t count);
  // Codes of rows [first, first + count), and what they add up to.
  void (*run)(const VqWork&, int64_t first, int64_t count, VqPlace& place, int slot);
  // Adds a place to the chunk, and with `last` the chunk to the total.
  void (*fold)(VqWork&, VqPlace& place, bool last);
  // Writes sums without their padding, and the candidates' vectors, of one group.
  void (*finish)(const VqWork&, int64_t group);
  // Rounds `count` floats of the codebook to the decoder's dtype.
  void (*narrow)(const float* from, void* to, int64_t count, DType dtype);
  // Decodes rows [first, first + count), first a multiple of eight; true if a code was clamped.
  bool (*decode)(const VqDecodeWork&, int64_t first, int64_t count);
};

namespace scalar {
extern const VqTasks vq_tasks;
}
namespace avx2 {
extern const VqTasks vq_tasks;
}
namespace avx512 {
extern const VqTasks vq_tasks;
}

}  // namespace lct
