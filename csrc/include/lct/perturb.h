// perturb and score: normal noise added to values, and a loss times the same noise, made again instead of stored.
//
//   perturb   out[i] = z[i mod size of z] + sigma * eps[i]
//   score     out[i] = loss[row of i] / (total * sigma) * eps[i]
//
// Layout       out [rows, channels, inner], row-major; z [rows / copies, channels, inner], the copies one behind the
//              other. sigma [1] or [channels].
// Noise        eps[i] = normal(word), where word number (offset + i) of the stream `seed` is word (offset + i) mod 4
//              of Philox4x32-10 with counter {n, n >> 32, 0, 0}, n = (offset + i) / 4, and key {seed, seed >> 32}.
//              With `antithetic` rows is even and row r of the second half has -eps of row r - rows / 2; the second
//              half takes no words.
// Normal       u = ((word >> 9) + 0.5) * 2^-23, then the inverse of the normal distribution by Wichura's PPND7
//              (Applied Statistics 37, 1988, algorithm AS 241), its logarithm by a series: |eps| < 5.3.
// Types        z and out: f32, f16 or bf16 (score: out); sigma and loss f32. Computed in fp32, rounded once to out.
// Determinism  the same bits from every backend, instruction set, thread count and grid: only multiplications,
//              additions, divisions and roots, each rounded to the nearest; a product never meets its sum in a fused
//              instruction. A NaN stays one, with bits of any kind.
// Empty input  rows * channels * inner == 0 writes nothing.
// Memory       nothing is allocated, and there is no workspace.
#pragma once

#include <cstdint>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct {

struct Noise {
  uint64_t seed, offset;
  bool antithetic;
};

// Of out.
struct NoiseShape {
  int64_t rows, channels, inner;
};

struct Perturb {
  const void* z;       // [rows / copies, channels, inner], dtype
  const float* sigma;  // [sigmas]
  void* out;           // [rows, channels, inner], dtype
  NoiseShape shape;
  int64_t copies, sigmas;
  Noise noise;
  DType dtype;
};

struct Score {
  const float* loss;   // [rows]
  const float* sigma;  // [sigmas]
  void* out;           // [rows, channels, inner], dtype
  NoiseShape shape;
  int64_t total, sigmas;
  Noise noise;
  DType dtype;
};

void perturb_cpu(const Perturb& args, int threads);
void score_cpu(const Score& args, int threads);

#ifdef LCT_WITH_CUDA
cudaError_t perturb_cuda(const Perturb& args, int device, cudaStream_t stream);
cudaError_t score_cuda(const Score& args, int device, cudaStream_t stream);
#endif

}  // namespace lct
