// Which words can be a row's nearest, found with whole numbers of 8 or 16 bits.
//
// An instruction of VNNI makes 64 products of 8 bits, or 32 of 16, where a fused multiply-add makes 16 of floats. The
// scores that it gives are not those of vq.h, but they are near, and by how much at most is known for each row. Where
// only one word can be the nearest, that is the code. Where several can, they are scored again in the steps that
// vq.h prescribes. So codes are those of the plain search, bit by bit. docs/vq.md derives the bound.
#pragma once

#include "cpu/vq_tasks.h"

namespace lct {

struct VqFilter {
  // Bytes that a group's words need, and a slot of parallel_for.
  int64_t (*group_bytes)(const VqWork&);
  int64_t (*scratch_bytes)(const VqWork&);
  // Readies the scratch of a slot for the first run.
  void (*begin)(const VqWork&, int slot);
  // The words of a group as numbers, and how far off those are. After all of its words are packed.
  void (*prepare)(const VqWork&, int64_t group);
  // Codes of 64 vectors, given by columns [width][64] and by rows with this stride. False where it did not find
  // them: the bound is not finite, or leaves so many words that the plain search is as fast.
  bool (*search)(const VqWork&, int64_t group, const float* columns, const float* rows, int64_t stride,
                 int32_t* codes, int slot);
};

namespace avx512vnni {
extern const VqFilter vq_filter_8_bits, vq_filter_16_bits;
}

}  // namespace lct
