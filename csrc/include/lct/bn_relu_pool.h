// bn_relu_pool: batch norm, ReLU and the average over windows that a critic reads, with their gradients.
//
//   rstd_c   = 1 / sqrt(var_c + eps)
//   xhat     = (x - mean_c) * rstd_c
//   z        = gamma_c * xhat + beta_c
//   y        = relu(z)
//   pooled_w = mean of relu(z) over window w               pool x pool windows of H/pool x W/pool
//   moments  = means over window w of [z active] and of [z active] * xhat; active is not (z <= 0)
//
//   g        = [z active] * (dy + dpooled_w / area)        never in memory
//   dbeta_c  = sum g,  dgamma_c = sum g * xhat
//   dx       = gamma * rstd * (g - dbeta / M - xhat * dgamma / M)   batch statistics, M = N H W
//   dx       = gamma * rstd * g                                     given statistics
//
// Layout       x, y, dy, dx: [N, C, H, W] dense, or [N, H, W, C] dense with channels_last. All others are
//              row-major: pooled, dpooled [N, C, P, P], moments [2, N, C, P, P], the rest [C].
// Types        x, y, dy, dx, pooled, dpooled: dtype. The rest fp32. pooled is made from relu(z) before that
//              is rounded. z below the smallest normal float counts as not active.
// Statistics   two passes over a chunk in cache, chunks folded in double precision: no difference of large
//              squares is ever taken. var is the biased variance.
// Gradients    without dy, dgamma and dbeta come from dpooled and moments; x is read once, for dx.
// NaN, Inf     in x: mean, var, and with batch statistics all of the channel's outputs become NaN (for Inf,
//              mean is NaN where torch gives Inf). With given statistics the value alone is affected.
// Sizes        all at least 1, pool divides height and width. Batch statistics of one value are refused above.
// Determinism  the same bits for every thread count: partial sums cover fixed chunks, a function of the shape
//              alone, and are folded in order.
// Memory       nothing is allocated; `workspace` holds what *_workspace returns, in bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lct/types.h"

namespace lct {

struct BnReluPoolShape {
  int64_t samples, channels, height, width;
  int64_t pool;  // windows a side
  bool channels_last;
  DType dtype;
};

struct BnReluPool {
  BnReluPoolShape shape;
  const void* x;
  const float* gamma;     // [C]
  const float* beta;      // [C]
  void* y;                // as x
  void* pooled;           // [N, C, P, P]
  float* mean;            // [C], written with batch_statistics, else read
  float* var;             // [C], likewise
  float* moments;         // [2, N, C, P, P]
  void* workspace;
  bool batch_statistics;
  double eps;
};

struct BnReluPoolBackward {
  BnReluPoolShape shape;
  const void* dy;         // as x, or null
  const void* dpooled;    // [N, C, P, P]
  const void* x;
  const float* gamma;     // [C]
  const float* beta;      // [C]
  const float* mean;      // [C]
  const float* var;       // [C]
  const float* moments;   // [2, N, C, P, P], unread with dy
  void* dx;               // as x; may be x itself, element by element
  float* dgamma;          // [C]
  float* dbeta;           // [C]
  void* workspace;
  bool batch_statistics;
  double eps;
};

size_t bn_relu_pool_cpu_workspace(const BnReluPoolShape& shape, int threads);
void bn_relu_pool_cpu(const BnReluPool& args, int threads);

size_t bn_relu_pool_backward_cpu_workspace(const BnReluPoolShape& shape, bool with_dy, int threads);
void bn_relu_pool_backward_cpu(const BnReluPoolBackward& args, int threads);

}  // namespace lct
