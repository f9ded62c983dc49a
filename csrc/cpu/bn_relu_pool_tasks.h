// The pieces of bn_relu_pool that run in parallel, compiled once an instruction set, and the layout they share.
//
// Contiguous maps (planes). A chunk is a run of samples of one channel, or a piece of a large plane. A group is
// a run of channels that one thread takes through statistics and output before the next; where its x fits, the
// first pass copies it to the thread's scratch. x then comes from memory once, and its planes, far apart in x
// where they may share a few cache sets, lie side by side.
//
// channels_last (rows). A chunk is a run of pixels, all channels. Output is made a row of windows at a time.
//
// How work is shared out may depend on the threads; chunks, and so every sum, depend on the shape alone.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/bn_relu_pool.h"

namespace lct {

// Floats of one chunk and channel. Statistics: a shift near the mean, sums of x - shift and of its square.
// Gradients: sums of g and of g * (x - mean).
constexpr int64_t kPartial = 3;

struct BnReluPoolWork {
  BnReluPoolShape shape;
  int64_t map;                // height * width
  int64_t rows, columns;      // of a window
  int64_t windows;            // pool * pool
  int64_t padded_channels;    // a multiple of 16
  int64_t padded_width;       // likewise

  const void* x;
  const void* dy;             // backward: or null
  const void* dpooled;        // backward
  void* out;                  // y or dx
  void* pooled;               // forward
  float* moments;             // forward
  bool stream;                // out goes past the caches
  bool batch_statistics;

  // Each [padded_channels], zeros behind the last channel.
  float* mean;
  float* rstd;
  float* scale;               // gamma * rstd
  float* beta;
  float* slope;               // dx = active * scale * (dy + d) + slope * (x - mean) + offset
  float* offset;

  float* partials;            // planes [C][chunks][3], rows [chunks][3][padded_channels]
  int64_t chunks;
  int64_t chunk_samples;      // planes: samples of a chunk, 1 where a plane has several pieces
  int64_t pieces;             // planes: chunks of one plane
  int64_t chunk_rows;         // rows: pixels of a chunk

  float* scratch;             // scratch_size floats for each slot
  int64_t scratch_size;
};

struct BnReluPoolTasks {
  // Statistics of one chunk of a channel; its first element at `from`, a plane every `stride` elements.
  void (*plane_statistics)(const BnReluPoolWork&, int64_t channel, int64_t chunk, const void* from,
                           int64_t stride);
  // One plane of x, read at `from`: y, pooled, moments.
  void (*plane_output)(const BnReluPoolWork&, int64_t sample, int64_t channel, const void* from, int slot);
  // Sums of gradients over the samples of one chunk of a channel.
  void (*plane_terms)(const BnReluPoolWork&, int64_t channel, int64_t chunk, int slot);
  void (*plane_dx)(const BnReluPoolWork&, int64_t sample, int64_t channel, int slot);

  // The same for channels_last: a chunk of pixels, or one row of windows of a sample.
  void (*row_statistics)(const BnReluPoolWork&, int64_t chunk);
  void (*row_output)(const BnReluPoolWork&, int64_t sample, int64_t window_row);
  void (*row_terms)(const BnReluPoolWork&, int64_t sample, int64_t window_row, int slot);
  void (*row_dx)(const BnReluPoolWork&, int64_t sample, int64_t window_row, int slot);
};

namespace scalar {
extern const BnReluPoolTasks bn_relu_pool_tasks;
}
namespace avx2 {
extern const BnReluPoolTasks bn_relu_pool_tasks;
}
namespace avx512 {
extern const BnReluPoolTasks bn_relu_pool_tasks;
}

}  // namespace lct
