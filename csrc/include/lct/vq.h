// vq: vectors coded as the index of the nearest word of a codebook, decoded, and the codebook's update.
//
// Row n of x is `groups` vectors of `depth` columns; group g has `codewords` words c_gk of its own.
//
//   code(n, g)     = argmin_k |c_gk|^2 / 2 - x_ng . c_gk          ties to the lowest k
//   counts_gk      = rows with code k
//   sums_gk        = sum of the x_ng with code k                  fp32
//   squared_error  = sum_ng |x_ng - c_g,code(n,g)|^2              fp32
//
// Layout       row-major and dense: x [rows, groups * depth], codebook [groups, codewords, depth].
// Codes        code i = n * groups + g takes bits [i b, (i + 1) b) of one flat stream, b = ceil(log2 codewords),
//              least significant bit first; bits beyond the last code are 0.
// Types        x and decoded x: dtype. codebook, sums, errors, candidates, state: fp32. counts: int64.
// Sizes        2 <= codewords <= 65536, 0 <= slots <= 4096, groups and depth >= 1.
// Rounding     fp32. The score of a word is half its squared norm, then depth fused multiply-subtracts from
//              column 0 up, so codes do not depend on the instruction set. A backend that cannot keep that
//              order may choose another word whose distance is as good as rounding allows.
// Not finite   a vector whose squared error is not finite (it holds a NaN or an Inf, or overflows) has code 0,
//              sets the flag, and is left out of counts, sums, squared_error and candidates. A word whose
//              score is NaN or +Inf is never chosen.
// Candidates   slot r of a group: of the rows n with (n mod 4096) mod slots == r, the vector with the largest
//              score, ties to the lowest n, and that score; no score above 0: NaN, and score 0. The score is the
//              squared error over an odd number below 2^24, hashed from the error's bits and n mod 4096: the
//              largest then belongs to a row with probability proportional to its error.
// Determinism  the same bits for every thread count, instruction set, grid and size of workspace. Chunks are rows
//              [4096 i, 4096 i + 4096); a chunk's sums are folded from runs of 512 rows in order, and chunks are
//              folded in order, each from zero: folding the results of single chunks likewise gives the bits of
//              the whole. Within a run the order is the backend's. Codes, counts, candidates and their scores
//              have the same bits on cpu and cuda.
// Empty input  rows >= 1 in encode and decode; the caller answers for none.
// Memory       nothing is allocated; `workspace` holds what *_workspace returns, in bytes (may be 0).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct {

struct VqEncode {
  const void* x;            // [rows, groups * depth]
  const float* codebook;    // [groups, codewords, depth]
  uint8_t* codes;           // [ceil(rows * groups * b / 8)]
  int64_t* counts;          // [groups, codewords]
  float* sums;              // [groups, codewords, depth]
  float* squared_error;     // []
  float* candidates;        // [groups, slots, depth]
  float* candidate_scores;  // [groups, slots]
  uint8_t* flag;            // [] 0 or 1
  void* workspace;
  int64_t rows, groups, codewords, depth, slots;
  DType dtype;
};

// A code >= codewords is read as codewords - 1 and sets the flag.
struct VqDecode {
  const uint8_t* codes;   // [ceil(rows * groups * b / 8)]
  const float* codebook;  // [groups, codewords, depth]
  void* x;                // [rows, groups * depth], dtype
  uint8_t* flag;          // [] 0 or 1
  void* workspace;
  int64_t rows, groups, codewords, depth;
  DType dtype;
};

// n <- decay n + (1 - decay) counts,  m <- decay m + (1 - decay) sums,  N = sum_k n_k,
// codebook_k <- m_k / ((n_k + eps) / (N + codewords eps) N), or as it was where that divisor is not above 0.
// Then the j-th word with n_k < revive_below takes the j-th candidate that is finite, while there are any:
// codebook_k = candidate, n_k = max(N / codewords, revive_below), m_k = n_k candidate.
struct VqUpdate {
  float* codebook;          // [groups, codewords, depth]
  float* state_counts;      // n [groups, codewords]
  float* state_sums;        // m [groups, codewords, depth]
  const int64_t* counts;    // [groups, codewords]
  const float* sums;        // [groups, codewords, depth]
  const float* candidates;  // [groups, slots, depth]
  int64_t groups, codewords, depth, slots;
  double decay, eps, revive_below;
};

// The encoder's workspace does not grow with rows: it is O(threads * groups * codewords * depth).
size_t vq_encode_cpu_workspace(int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots,
                               DType dtype, int threads);
void vq_encode_cpu(const VqEncode& args, int threads);

size_t vq_decode_cpu_workspace(int64_t rows, int64_t groups, int64_t codewords, int64_t depth, DType dtype);
void vq_decode_cpu(const VqDecode& args, int threads);

void vq_update_cpu(const VqUpdate& args, int threads);

#ifdef LCT_WITH_CUDA
// Bytes that serve the encoder well: at most 64 MiB and half norms, unless 4096 rows need more. Any number of bytes
// from what 4096 rows need on gives the same bits; with less it returns cudaErrorInvalidValue.
size_t vq_encode_cuda_workspace(int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots);
cudaError_t vq_encode_cuda(const VqEncode& args, size_t workspace_bytes, int device, cudaStream_t stream);

// Takes no workspace.
cudaError_t vq_decode_cuda(const VqDecode& args, int device, cudaStream_t stream);

size_t vq_update_cuda_workspace(int64_t groups, int64_t codewords);
cudaError_t vq_update_cuda(const VqUpdate& args, void* workspace, int device, cudaStream_t stream);
#endif

}  // namespace lct
